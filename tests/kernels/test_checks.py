"""What the public ops refuse, in one line, and what is empty but lawful."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hysparse_kernels as ops
from hysparse_kernels import KeyRange, causal
from tests.kernels.calls import OPS, Sizes, arguments, d_out_of, run

SIZES = Sizes(T=5, S=9)
CUT, INT, META = "cut", torch.int32, "meta"


def _changed(x: Tensor, change: Any) -> Tensor:
    if change == CUT:
        return x[..., :-1]
    return x.to(change) if isinstance(change, torch.dtype) else x.to(torch.device(change))


WRONG: list[tuple[str, str, Any, str]] = [
    ("full_attention", "q", CUT, "q (2, 5, 4, 15), k (2, 9, 2, 16), v (2, 9, 2, 16): B and D"),
    ("full_attention", "k", torch.float64, "q float32, k float64, v float32: expected one"),
    ("full_attention", "q", META, "q meta, k cpu, v cpu: expected one device"),
    ("full_attention", "sinks", CUT, "sinks has shape (3,), expected (H,) = (4,)"),
    ("full_attention", "sinks", INT, "sinks is int32: expected one of bfloat16"),
    ("full_attention", "sinks", META, "sinks is on meta, but q on cpu"),
    ("full_attention", "key_range.last", CUT, "key_range.last has shape (2, 4), expected (B or 1"),
    ("full_attention", "key_range.last", torch.float32, "key_range.last is float32: expected"),
    ("full_attention", "key_range.first", CUT, "key_range.first has shape (2, 4), expected"),
    ("full_attention", "key_range.first", META, "key_range.first is on meta, but q on cpu"),
    ("full_attention", "key_range.mask", CUT, "key_range.mask has shape (2, 8), expected (B, S)"),
    ("full_attention", "key_range.mask", torch.uint8, "key_range.mask is uint8: expected one of b"),
    ("block_sparse_attention", "block_idx", torch.float32, "block_idx is float32: expected one of"),
    ("block_sparse_attention", "block_idx", torch.bool, "block_idx is bool: expected one of int64"),
    ("block_sparse_attention", "block_idx", META, "block_idx is on meta, but q on cpu"),
    ("gated_sum", "gate_logits", CUT, "gate_logits has shape (2, 5, 4, 1), expected (B, T, H, 2)"),
    ("gated_sum", "gate_logits", INT, "gate_logits is int32: expected one of bfloat16"),
    ("gated_sum", "o_window", torch.float64, "o_sparse float32, o_window float64: expected one"),
    ("gated_sum", "o_window", CUT, "o_sparse (2, 5, 4, 16), o_window (2, 5, 4, 15): expected (B"),
    ("sparse_layer_attention", "window_k", CUT, "q (2, 5, 4, 16), window_k (2, 9, 2, 15)"),
    ("sparse_layer_attention", "window_v", CUT, "window_v (2, 9, 2, 15): G and Dv must agree"),
    ("sparse_layer_attention", "sinks", CUT, "sinks has shape (4, 1), expected (H, 2) = (4, 2)"),
    ("sparse_layer_attention", "window_range.last", CUT, "window_range.last has shape (2, 4)"),
]


@pytest.mark.parametrize(("op", "name", "change", "message"), WRONG)
def test_an_argument_that_does_not_fit(op: str, name: str, change: Any, message: str) -> None:
    tensors = arguments(op, SIZES, "cpu")
    tensors[name] = _changed(tensors[name], change)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        run(op, tensors, None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        ("full_attention", {"top_k_blocks": -1}, "top_k_blocks is -1: it must be at least 0"),
        ("full_attention", {"block_size": -4}, "block_size is -4: it must be at least 1"),
        ("full_attention", {"softcap": 0.0}, "softcap is 0.0: it must be positive and finite"),
        ("full_attention", {"softcap": -2.0}, "softcap is -2.0"),
        ("full_attention", {"scale": float("nan")}, "scale is nan: it must be finite"),
        ("sliding_window_attention", {"window_tokens": 0}, "window_tokens is 0"),
        ("block_sparse_attention", {"block_size": 0}, "block_size is 0"),
    ],
)
def test_an_option_that_does_not_fit(op: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run(op, arguments(op, SIZES, "cpu"), None, **options)


@pytest.mark.parametrize(
    ("q", "k"), [((1, 3, 0, 4), (1, 3, 2, 4)), ((1, 3, 2, 4), (1, 3, 0, 4)), ((1, 3, 2, 0),) * 2]
)
def test_no_heads_and_no_width_are_refused(q: tuple[int, ...], k: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="none of them 0 but B"):
        ops.full_attention(torch.zeros(q), torch.zeros(k), torch.zeros(k))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x._replace(diagonal=5), "the last of 5 queries would see slot 9 of 9"),
        (lambda x: x._replace(first=x.last), "there must be no first and no mask"),
    ],
)
def test_a_diagonal_that_contradicts(change: Callable[[KeyRange], KeyRange], message: str) -> None:
    q, k = torch.zeros(1, 5, 2, 4), torch.zeros(1, 9, 2, 4)
    with pytest.raises(ValueError, match=message):
        ops.full_attention(q, k, k, key_range=change(causal(5, 9, q.device)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_integers_of_any_width_say_the_same(dtype: torch.dtype) -> None:
    tensors = arguments("block_sparse_attention", SIZES, "cpu")
    expected = run("block_sparse_attention", tensors, None)
    for name in ("block_idx", "key_range.first", "key_range.last"):
        tensors[name] = tensors[name].to(dtype)
    found = run("block_sparse_attention", tensors, None)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


EMPTY = {
    "no batch": {"B": 0},
    "no queries": {"T": 0},
    "no keys": {"S": 0},
    "no keys, one query": {"T": 1, "S": 0},
    "no blocks listed": {"K": 0},
    "nothing at all": {"B": 0, "T": 0, "S": 0, "K": 0},
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("ranges", [False, True], ids=["causal", "ranges"])
@pytest.mark.parametrize("empty", EMPTY)
def test_what_is_empty(empty: str, ranges: bool, sinks: bool) -> None:
    sizes = replace(Sizes(B=1, T=3, S=4, H=2, G=1, ranges=ranges), **EMPTY[empty])
    for op in OPS:
        if empty == "no blocks listed" and "block_idx" not in arguments(op, sizes, "cpu"):
            continue
        tensors = arguments(op, sizes, "cpu")
        if not sinks:
            tensors.pop("sinks", None)
        found = run(op, tensors, d_out_of(op, sizes, "cpu"))
        assert found["out"].shape == sizes.of("BTHD")
        sees_window = empty == "no blocks listed" and op == "sparse_layer_attention"
        if op != "gated_sum" and not sees_window:
            assert not found["out"].any()
            unseen = tensors["sinks"] if sinks and op != "sparse_layer_attention" else -torch.inf
            if "lse" in found:
                torch.testing.assert_close(found["lse"], torch.zeros_like(found["lse"]) + unseen)
            for name, x in tensors.items():
                if f"d {name}" in found:
                    assert found[f"d {name}"].shape == x.shape and not found[f"d {name}"].any()
        if found.get("block_idx") is not None:
            assert found["block_idx"].eq(-1).all()
        if found.get("block_scores") is not None:
            assert found["block_scores"].shape == (sizes.B, sizes.T, 1, -(-sizes.S // 16))
