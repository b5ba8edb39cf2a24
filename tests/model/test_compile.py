"""torch.compile by inductor on a CPU: what it gives is what the model gives."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from hysparse_kernels import sliding_window_attention
from tests.model.equivalences import SPEC, ids
from tests.model.tiny import hysparse_model

pytestmark = pytest.mark.filterwarnings("ignore")  # inductor's own


def small_model() -> Any:
    """One full and one sparse layer."""
    spec = replace(SPEC, pattern="FS")
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 2048}
    return hysparse_model("llama", spec, torch.float32, **sizes)


def losses_and_gradients(model: Any, run: Any, tokens: int) -> list[torch.Tensor]:
    x = ids(tokens=tokens)
    model.zero_grad()
    loss = run(input_ids=x, labels=x, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def check(model: Any, tokens: int, **options: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, **options)
    expected = losses_and_gradients(model, model, tokens)
    for ours, theirs in zip(losses_and_gradients(model, compiled, tokens), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_inductor_compiles_a_window_of_gathered_keys() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 40, 2, 4).unbind()
    attend = partial(sliding_window_attention, window_tokens=6)
    compiled = torch.compile(attend, fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled.out, attend(q, k, v).out)


@pytest.mark.long
@pytest.mark.parametrize("tokens", [64, 100, 300, 1500])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_inductor_gives_the_same_loss_and_gradients(tokens: int, fullgraph: bool) -> None:
    check(small_model(), tokens, fullgraph=fullgraph)


@pytest.mark.long
def test_inductor_takes_lengths_that_change() -> None:
    model = small_model()
    compiled = torch.compile(model, dynamic=True)
    with torch.no_grad():
        for tokens in (40, 100, 301):
            x = ids(tokens=tokens)
            logits = compiled(x, use_cache=False).logits
            torch.testing.assert_close(
                logits, model(x, use_cache=False).logits, rtol=2e-4, atol=2e-5
            )


@pytest.mark.long
@pytest.mark.parametrize("tokens", [17, 300])
def test_a_compiled_static_cache_generates_the_same(tokens: int) -> None:
    model, x = small_model(), ids(tokens=tokens)
    options = {"attention_mask": torch.ones_like(x), "do_sample": False, "max_new_tokens": 8}
    expected = model.generate(x, **options)
    model.forward = torch.compile(model.forward)
    static = model.generate(x, cache_implementation="static", disable_compile=True, **options)
    assert static.equal(expected)
