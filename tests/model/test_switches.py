"""The paper's Table 4 ablations: whose keys and values each branch reads, and no SWA branch."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.model.attention import LayerCall
from hysparse_cli.model.config import HysparseSpec, SparseKv, WindowKv
from hysparse_cli.model.kv_cache import held_kv_bytes, kv_cache_of
from hysparse_cli.model.state import ForwardOptions, Variation
from hysparse_cli.recipe import ConvertOptions, load_section
from tests.conftest import Hysparse
from tests.model.equivalences import (
    SPEC,
    TOKENS,
    cached,
    checkpointed,
    chunked_prefill,
    ids,
    left_padded,
    packed,
)
from tests.model.test_generation import generated
from tests.model.tiny import hysparse_model

SWITCHES = [
    replace(SPEC, sparse_kv=sparse_kv, window_kv=window_kv)
    for sparse_kv, window_kv in product(get_args(SparseKv), get_args(WindowKv))
]
ALL = pytest.mark.parametrize("spec", SWITCHES, ids=lambda s: f"{s.sparse_kv}-{s.window_kv}")
EXACT = 1e-12


def attended(q: Tensor, k: Tensor, v: Tensor, times: Tensor, sinks: Tensor) -> Tensor:
    """Softmax attention from its formula: key s counts ``times`` (B, T, G, S); sinks (H,)."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    logits = torch.einsum("bthd,bshd->bths", q, k) * q.shape[-1] ** -0.5
    weights = logits.exp() * times.repeat_interleave(group, 2)
    total = weights.sum(-1, keepdim=True) + sinks.exp()[:, None]
    return torch.einsum("bths,bshd->bthd", weights / total, v)


class Watched:
    """A forward of ``model``: what its observer saw, and what each sparse layer put out."""

    def __init__(self, model: Any, spec: HysparseSpec, variation: Variation | None = None):
        self.spec = spec
        self.seen: dict[int, LayerCall] = {}
        self.block_idx: dict[int, Tensor | None] = {}
        self.out: dict[int, Tensor] = {}
        self.gate_logits: dict[int, Tensor] = {}
        for layer in spec.layers.sparse_layers:
            attention = model.model.layers[layer].self_attn
            attention.o_proj.register_forward_pre_hook(
                lambda module, args, layer=layer: self.out.update({layer: args[0]})
            )
            if attention.hysparse.gate is not None:
                attention.hysparse.gate.register_forward_hook(
                    lambda module, args, out, layer=layer: self.gate_logits.update({layer: out})
                )
        options = ForwardOptions(observer=self.observe, variation=variation)
        model(ids(), use_cache=False, hysparse=options)

    def observe(self, call: LayerCall) -> Tensor:
        out = call.attend()
        self.seen[call.layer], self.block_idx[call.layer] = call, call.block_idx
        return out

    def times(self, layer: int) -> tuple[Tensor, Tensor]:
        """How often (0 or 1) each key is in the block-sparse branch, and in the window."""
        t, s = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
        block_idx = self.block_idx[layer]
        assert block_idx is not None
        listed = block_idx[..., None] == s // self.spec.block_size
        selected = listed.any(-2) & (s <= t)[:, None]  # [B, T, G, S]
        recent = ((s <= t) & (s > t - self.spec.window_tokens))[:, None].expand_as(selected)
        return selected.double(), recent.double()

    def kv(self, layer: int, whose: str) -> tuple[Tensor, Tensor]:
        seen = self.seen[self.spec.layers.server_of(layer) if whose == "shared" else layer]
        return seen.k, seen.v


@ALL
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@torch.no_grad()
def test_each_sparse_layer_is_its_formula(family: str, spec: HysparseSpec) -> None:
    model = hysparse_model(family, spec)
    watched = Watched(model, spec)
    for layer, out in watched.out.items():
        q, own_sinks = watched.seen[layer].q, watched.seen[layer].sinks
        sinks = model.model.layers[layer].self_attn.hysparse.sinks
        sinks = sinks if own_sinks is None else sinks + own_sinks[:, None]
        selected, recent = watched.times(layer)
        expected = attended(q, *watched.kv(layer, spec.sparse_kv), selected, sinks[:, 0])
        if spec.window_kv != "none":
            window = attended(q, *watched.kv(layer, spec.window_kv), recent, sinks[:, 1])
            gates = watched.gate_logits[layer].unflatten(-1, (-1, 2)).sigmoid()
            expected = gates[..., :1] * expected + gates[..., 1:] * window
        assert torch.allclose(out, expected.flatten(2), rtol=0, atol=EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@torch.no_grad()
def test_merged_branches_are_one_softmax_over_the_keys_of_both(family: str) -> None:
    spec = replace(SPEC, sparse_kv="own")
    variation = Variation(spec, frozenset(spec.layers.sparse_layers), learned=False)
    watched = Watched(hysparse_model(family, spec), spec, variation)
    for layer, out in watched.out.items():
        selected, recent = watched.times(layer)
        q, own_sinks = watched.seen[layer].q, watched.seen[layer].sinks
        sinks = torch.full((4,), -torch.inf).double() if own_sinks is None else own_sinks
        expected = attended(q, *watched.kv(layer, "own"), selected + recent, sinks)
        assert torch.allclose(out, expected.flatten(2), rtol=0, atol=EXACT)


@ALL
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("same", [cached, chunked_prefill, left_padded, packed, checkpointed])
def test_it_computes_the_same_in_every_way(same: Any, family: str, spec: HysparseSpec) -> None:
    assert same(family, spec) <= EXACT


@ALL
def test_a_static_cache_generates_the_same(spec: HysparseSpec) -> None:
    model, x = hysparse_model("qwen3", spec), ids(tokens=17)
    static = generated(model, x, cache_implementation="static", disable_compile=True)
    assert static.equal(generated(model, x, use_cache=False))


@ALL
@torch.no_grad()
def test_the_bytes_of_a_real_cache_are_the_arithmetic(spec: HysparseSpec) -> None:
    model, x = hysparse_model("qwen3", spec, torch.float32), ids(batch=1)
    held = held_kv_bytes(model(x, use_cache=True).past_key_values)
    assert held == kv_cache_of(model.config).total_bytes(TOKENS, itemsize=4)
    by_layer = {"own": TOKENS, "shared": 5 if spec.window_kv == "own" else 1}[spec.sparse_kv]
    assert held == (2 * TOKENS + 3 * by_layer) * 2 * 2 * 8 * 4


@torch.no_grad()
def test_a_variation_is_the_model_of_its_switches() -> None:
    """One model whose switches change between forwards computes what other models would."""
    model, x = hysparse_model("llama", SPEC), ids()
    sparse = frozenset(SPEC.layers.sparse_layers)
    for spec in SWITCHES:
        other = hysparse_model("llama", spec)
        other.load_state_dict(
            {
                name: tensor if tensor.shape == other.state_dict()[name].shape else tensor[:, :1]
                for name, tensor in model.state_dict().items()
                if name in other.state_dict()
            }
        )
        variation = Variation(spec, sparse, learned=True)
        varied = model(x, use_cache=False, hysparse=ForwardOptions(variation=variation)).logits
        assert varied.equal(other(x, use_cache=False).logits)
    nothing = Variation(SPEC, frozenset(), learned=True)
    dense = model(x, use_cache=False, hysparse=ForwardOptions(variation=nothing)).logits
    whole = Variation(
        replace(SPEC, sparse_kv="own", window_kv="none", top_k_tokens=TOKENS), sparse, learned=False
    )
    every_block = model(x, use_cache=False, hysparse=ForwardOptions(variation=whole)).logits
    assert torch.allclose(every_block, dense, rtol=0, atol=EXACT)


@pytest.mark.parametrize("switch", ["sparse_kv=own", "window_kv=shared", "window_kv=none"])
def test_hybrid_swa_takes_no_switch(switch: str) -> None:
    with pytest.raises(InvalidRecipe, match="hybrid-swa has the SWA branch alone") as error:
        load_section(ConvertOptions, None, ["convert.layout=hybrid-swa", f"convert.{switch}"])
    assert "\n" not in str(error.value)
    name, _, value = switch.partition("=")
    with pytest.raises(ValueError, match="hybrid-swa has the SWA branch alone"):
        HysparseSpec("FSF", layout="hybrid-swa", **{name: value})  # type: ignore[arg-type]


def test_convert_writes_the_switches(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    sizes = ("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)
    switch = ("--set", "convert.window_kv=none")
    assert hysparse("convert", tiny_original, tmp_path / "out", *sizes, *switch).exit_code == 0
    run = hysparse("inspect-topk", tmp_path / "out", "--prompt", "w1 w2 " * 20, "--json")
    branches = [layer["branches"] for layer in json.loads(run.stdout)["served_layers"]]
    assert branches and {(b["gate_sparse"], b["gate_window"]) for b in branches} == {(1.0, 0.0)}
