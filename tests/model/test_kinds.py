"""The rows of kinds of sparse layer and of gates: what each adds, keeps, reads, and computes."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from hysparse_cli.model import kinds
from hysparse_cli.model.config import HysparseSpec, new_tensors
from hysparse_cli.model.gates import GATES
from hysparse_cli.model.kinds import FULL, KINDS, WITHOUT_WINDOW, Kind, LayoutName
from hysparse_cli.model.kv_cache import held_kv_bytes, kv_cache_of
from hysparse_cli.model.state import ForwardOptions
from tests.model.equivalences import SPEC, TOKENS, ids
from tests.model.tiny import hysparse_model

ROWS = pytest.mark.parametrize("name", KINDS)
GATE_ROWS = pytest.mark.parametrize("name", GATES)


def spec_of_kind(name: str) -> HysparseSpec:
    if name == WITHOUT_WINDOW:
        return replace(SPEC, window_kv="none")
    return replace(SPEC, layout=name)  # type: ignore[arg-type]


def test_every_layout_has_a_row() -> None:
    assert set(get_args(LayoutName)) == set(KINDS) - {WITHOUT_WINDOW}


@ROWS
def test_a_kind_adds_a_sink_for_each_branch_and_its_gates(name: str) -> None:
    spec, kind = spec_of_kind(name), KINDS[name]
    assert spec.kind is kind
    tensors = new_tensors(4, 32, spec)
    assert tensors["hysparse.sinks"].shape == (4, len(kind.branches))
    assert len(kind.branches) == len(kind.reach(spec)) and (kind.gate is None) == (
        "hysparse.gate.weight" not in tensors
    )
    if kind.gate is not None:
        rows = 4 * kind.gate.logits_per_head
        assert tensors["hysparse.gate.weight"].shape == (rows, 32)
        assert tensors["hysparse.gate.bias"].shape == (rows,)


@ROWS
@torch.no_grad()
def test_the_cache_of_a_kind_holds_what_its_row_says(name: str) -> None:
    spec, kind = spec_of_kind(name), KINDS[name]
    model = hysparse_model("qwen3", spec, torch.float32)
    held = held_kv_bytes(model(ids(batch=1), use_cache=True).past_key_values)
    assert held == kv_cache_of(model.config).total_bytes(TOKENS, itemsize=4)
    by_layer = TOKENS if kind.caches_all(spec) else kind.cache_window(spec) - 1
    assert held == (2 * TOKENS + 3 * by_layer) * 2 * 2 * 8 * 4


@ROWS
@torch.no_grad()
def test_only_a_kind_that_selects_is_served(name: str) -> None:
    served: list[bool] = []

    def note(call: Any) -> torch.Tensor:
        out: torch.Tensor = call.attend()
        served.append(call.block_idx is not None)
        return out

    spec = spec_of_kind(name)
    hysparse_model("qwen3", spec)(ids(), hysparse=ForwardOptions(observer=note))
    assert served == [KINDS[name].selects] * 5


@torch.no_grad()
def test_sparse_layers_of_layout_full_are_full() -> None:
    model, x = hysparse_model("qwen3", spec_of_kind("full")), ids()
    kept: list[Kind] = []

    def note(call: Any) -> torch.Tensor:
        kept.append(call.kind)
        out: torch.Tensor = call.attend()
        return out

    model(x, hysparse=ForwardOptions(observer=note))
    assert kept == [FULL] * 5


@GATE_ROWS
def test_the_logits_of_weights_give_them_back(name: str) -> None:
    gate = GATES[name]
    given = torch.randn(3, 5, gate.logits_per_head, generator=torch.Generator().manual_seed(0))
    weights = gate.weights(given)
    assert weights.shape == (3, 5, 2)
    torch.testing.assert_close(gate.weights(gate.logits(weights, 0.0)), weights)
    edges = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert gate.logits(edges, 1e-6).isfinite().all()


@pytest.mark.parametrize("name", [name for name, gate in GATES.items() if gate.fused])
@torch.no_grad()
def test_the_kernels_compute_the_gate_that_they_fuse(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(fused: bool) -> torch.Tensor:
        gate = replace(GATES[name], fused=fused)
        kind = replace(KINDS["hysparse"], gate=gate)
        monkeypatch.setitem(kinds.KINDS, "hysparse", kind)
        found: torch.Tensor = hysparse_model("gpt_oss", SPEC)(ids(), use_cache=False).logits
        return found

    torch.testing.assert_close(logits(False), logits(True), rtol=0, atol=1e-12)
