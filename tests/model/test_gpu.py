"""The same models on a CUDA device: what they compute, how they decode, how they train."""

import pytest
import torch

from hysparse_cli.model.kv_cache import held_kv_bytes, kv_cache_of
from tests.model.equivalences import SPEC, ids, largest
from tests.model.tiny import hysparse_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = ["llama", "qwen3", "gemma2", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_the_cpus(family: str) -> None:
    model, x = hysparse_model(family, SPEC), ids()
    expected = model(x, use_cache=False).logits
    assert largest(model.cuda()(x.cuda(), use_cache=False).logits.cpu(), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_the_same_with_any_cache(family: str) -> None:
    model, x = hysparse_model(family, SPEC).cuda(), ids(tokens=17).cuda()
    options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 12, "do_sample": False}
    without = model.generate(x, use_cache=False, **options)
    assert model.generate(x, **options).equal(without)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert model.generate(x, **static, **options).equal(without)


@torch.no_grad()
def test_a_cache_holds_the_arithmetic() -> None:
    model, x = hysparse_model("qwen3", SPEC, torch.bfloat16).cuda(), ids().cuda()
    cache = model(x, use_cache=True).past_key_values
    counted = kv_cache_of(model.config).total_bytes(x.shape[1], itemsize=2)
    assert held_kv_bytes(cache) == len(x) * counted


def test_gradients_under_checkpointing_are_the_plain_ones() -> None:
    model, x = hysparse_model("qwen3", SPEC).cuda().train(), ids().cuda()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(x, labels=x, use_cache=False).loss.backward()
        gradient: torch.Tensor = model.model.layers[0].self_attn.k_proj.weight.grad
        return gradient.clone()

    plain = gradient()
    model._set_gradient_checkpointing(
        True, lambda f, *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
    )
    assert largest(gradient(), plain) < 1e-12
