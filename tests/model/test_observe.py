"""Watching a dense model: the same output as unwatched, and each layer's tensors as they are."""

from typing import Any

import pytest
import torch

from hysparse_cli.families import FAMILIES
from hysparse_cli.model.logits import hidden_states
from hysparse_cli.model.observe import LayerSeen, watch_attention
from hysparse_kernels import full_attention
from tests.model import tiny


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_watched_forward_is_the_dense_one(family: str) -> None:
    model: Any = tiny.dense_model(family)
    before = model.config._attn_implementation
    ids = torch.arange(3, 90)[None].repeat(2, 1)
    with torch.no_grad():
        expected = hidden_states(model, ids)
    seen: dict[int, LayerSeen] = {}
    watched = watch_attention(model, ids, seen.__setitem__)
    if family != "gemma2":  # whose softcap the default implementation leaves out
        torch.testing.assert_close(watched, expected)
    assert model.config._attn_implementation == before
    assert list(seen) == list(range(model.config.num_hidden_layers))
    for found in seen.values():
        assert found.x.shape == found.residual.shape == (2, 87, 32)
        assert found.q.shape[:2] == found.k.shape[:2] == found.out.shape[:2] == (2, 87)
        assert found.softcap == getattr(model.config, "attn_logit_softcapping", None)
    with torch.no_grad():
        assert torch.equal(hidden_states(model, ids), expected)  # nothing is left behind


def test_what_is_seen_gives_the_output_again() -> None:
    model: Any = tiny.dense_model("qwen3")
    seen: dict[int, LayerSeen] = {}
    watch_attention(model, torch.arange(3, 90)[None], seen.__setitem__)
    for layer, found in seen.items():
        out = full_attention(found.q, found.k, found.v, scale=found.scale).out
        torch.testing.assert_close(found.out, out)
        norm = model.model.layers[layer].input_layernorm
        torch.testing.assert_close(found.x, norm(found.residual))
