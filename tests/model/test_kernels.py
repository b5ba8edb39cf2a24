"""Whole models on the Triton backend: the same as on the reference, but for rounding."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hysparse_cli.model.config import HysparseSpec
from hysparse_kernels import backends
from tests.kernels.tolerance import assert_within_tolerance
from tests.kernels.triton.conftest import where as where
from tests.model.equivalences import ids
from tests.model.tiny import hysparse_model

SPEC = HysparseSpec("FS", block_size=16, top_k_tokens=32, window_tokens=20)
SIZES = {"num_hidden_layers": 2, "head_dim": 16}
TOKENS, PREFILL, PADS = 38, 36, 3
# The interpreter is slow: one family there, others on a GPU.
FAMILIES = ["qwen3", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("gpt_oss", "gemma2"))]


def a_model(family: str, dtype: torch.dtype, where: str) -> Any:
    return hysparse_model(family, SPEC, **SIZES).to(where, dtype)


def packed(x: Tensor) -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(n, device=x.device) for n in (17, 1, TOKENS - 18)])
    return {"position_ids": positions.expand(len(x), -1), "use_cache": False}


def padded(x: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(x)
    mask[0, :PADS] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def logits(model: Any, x: Tensor) -> Tensor:
    """Of a packed row, of a padded prefill, and of tokens decoded one by one after it."""
    whole, options = model(x, **packed(x)).logits, padded(x)
    prefill = model(x[:, :PREFILL], **{name: value[:, :PREFILL] for name, value in options.items()})
    parts, cache = [prefill.logits[:, PADS:]], prefill.past_key_values
    for t in range(PREFILL, TOKENS):
        step = model(
            x[:, t : t + 1],
            attention_mask=options["attention_mask"][:, : t + 1],
            position_ids=options["position_ids"][:, t : t + 1],
            past_key_values=cache,
        )
        parts.append(step.logits)
    return torch.cat([whole, *parts], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = ids(tokens=TOKENS).to(where)
    truth = logits(a_model(family, torch.float64, where), x)
    columns = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, backend)
        columns.append(logits(a_model(family, torch.float32, where), x))
    assert_within_tolerance(*columns, truth, name=family)


def test_gradients(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = ids(tokens=TOKENS, batch=1).to(where)

    def gradient(dtype: torch.dtype, checkpointing: bool = False) -> list[Tensor]:
        model = a_model("qwen3", dtype, where).train()
        if checkpointing:
            model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
        model(x, labels=x, **packed(x)).loss.backward()
        return [p.grad for p in model.parameters()]

    truth = gradient(torch.float64)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    plain = gradient(torch.float32)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "triton")
    for ours, again, theirs, exact in zip(
        gradient(torch.float32), gradient(torch.float32, True), plain, truth, strict=True
    ):
        assert_within_tolerance(ours, theirs, exact, gradient=True)
        assert_within_tolerance(again, theirs, exact, gradient=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # inductor has advice to give
def test_a_static_cache_decodes_the_same_in_cuda_graphs() -> None:
    model, x = a_model("qwen3", torch.float32, "cuda"), ids(tokens=TOKENS).cuda()
    options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(x, **options)
    compiled = model.generate(x, cache_implementation="static", **options)
    assert compiled.equal(expected)
