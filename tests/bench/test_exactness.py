"""The check of a bench's attention finds right attention right, and wrong attention wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hysparse_cli.bench.attention import AttentionPart
from hysparse_cli.bench.decode import decode
from hysparse_cli.bench.exactness import AttentionCheck, wrong
from hysparse_cli.bench.lists import local_lists
from hysparse_cli.bench.prefill import measure_prefill
from hysparse_cli.bench.train import measure_train
from hysparse_cli.model.attention import LayerCall
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.state import ForwardState
from tests.model.tiny import dense_model, hysparse_model
from tests.observed import observed

PATTERN, SIZES = "FSSFS", {"block_size": 4, "top_k_tokens": 8, "window_tokens": 6}
ALL = {"full_attention_error", "sparse_attention_error", "selection_error"}
LAYOUTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "hysparse": ({}, ALL),
    "hybrid-swa": ({"layout": "hybrid-swa"}, ALL - {"selection_error"}),
    "no window": ({"window_kv": "none"}, ALL),
    "own keys": ({"sparse_kv": "own"}, ALL),
}


def observed_model(switches: dict[str, Any]) -> tuple[Any, AttentionPart]:
    model = hysparse_model("qwen3", HysparseSpec(PATTERN, **{**SIZES, **switches}), torch.float32)
    return model, observed(model)


def errors_of(part: AttentionPart, measure: Callable[[], Any]) -> dict[str, float]:
    part.check = AttentionCheck()
    measure()
    return part.check.errors()


def found_by_all_phases(model: Any, part: AttentionPart) -> dict[str, dict[str, float]]:
    sizes = (model, part, 40, 2)
    return {
        "prefill": errors_of(part, lambda: measure_prefill(*sizes, seed=0)),
        "decode": errors_of(part, lambda: decode(*sizes, steps=2, seed=0)),
        "train": errors_of(part, lambda: measure_train(*sizes, seed=0, checkpointing=True)),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_right_attention_is_within_rounding(layout: str) -> None:
    switches, expected = LAYOUTS[layout]
    model, part = observed_model(switches)
    for phase, errors in found_by_all_phases(model, part).items():
        assert errors.keys() == expected, phase
        assert wrong(errors, torch.float32) is None
        assert errors["sparse_attention_error"] > 0, "compared with itself"


def test_dense_attention_is_held_to_the_same() -> None:
    model = dense_model("qwen3").float()
    part = observed(model)
    for errors in found_by_all_phases(model, part).values():
        assert 0 < errors["full_attention_error"] < 1e-6 and len(errors) == 1


def test_given_lists_are_read_but_were_not_selected() -> None:
    model, part = observed_model({})
    part.lists = local_lists(40, 2, 2, 4, torch.Generator().manual_seed(0))
    errors = errors_of(part, lambda: measure_prefill(model, part, 40, 2, seed=0))
    assert errors.keys() == ALL - {"selection_error"} and wrong(errors, torch.float32) is None


@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_wrong_attention_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, part = observed_model({})
    right = part.attend

    def off(call: LayerCall) -> torch.Tensor:
        is_it = (call.branches is None) == (kind == "full")
        return right(call) * (1.001 if is_it else 1)

    monkeypatch.setattr(part, "attend", off)
    errors = errors_of(part, lambda: measure_prefill(model, part, 40, 2, seed=0))
    assert errors[f"{kind}_attention_error"] == pytest.approx(1e-3, rel=0.01)
    said = wrong(errors, torch.float32)
    assert said is not None and said.startswith(f"wrong: {kind}_attention_error 1.0e-03; 1.0e-05")
    assert wrong(errors, torch.bfloat16) is None


def test_a_wrong_selection_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The earliest blocks in place of the best: the layers that read them do so rightly."""
    model, part = observed_model({})
    publish = ForwardState.publish

    def earliest(state: ForwardState, layer: int, shared: Any) -> None:
        first = torch.arange(2, dtype=torch.int32).expand_as(shared.block_idx)
        publish(state, layer, shared._replace(block_idx=first))

    monkeypatch.setattr(ForwardState, "publish", earliest)
    errors = errors_of(part, lambda: measure_prefill(model, part, 40, 2, seed=0))
    assert errors["selection_error"] > 0.1 and errors["sparse_attention_error"] < 1e-6


def test_nan_is_wrong() -> None:
    assert wrong({"full_attention_error": float("nan"), "kv_bytes": 1}, torch.bfloat16)
