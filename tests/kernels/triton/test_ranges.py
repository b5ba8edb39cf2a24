"""Odd key ranges, lists and numbers: what was silent and wrong, or read out of bounds."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import hysparse_kernels as ops
from hysparse_kernels import KeyRange, backends, causal
from tests.kernels.calls import Sizes, arguments, d_out_of, run, truth_of
from tests.kernels.tolerance import assert_within_tolerance

PREFILL = Sizes(T=33, S=36, H=2, G=1, dtype=torch.float16)
DECODE = replace(PREFILL, T=1)
UNSELECTING = {"block_size": None, "top_k_blocks": 0, "return_block_scores": False}
ATTENTION = [
    "full_attention",
    "block_sparse_attention",
    "sliding_window_attention",
    pytest.param("sparse_layer_attention", marks=pytest.mark.long),
]


pytestmark = pytest.mark.usefixtures("backend")


def check(op: str, tensors: dict[str, Tensor], d_out: Tensor | None, **options: object) -> None:
    """Held to the law with the reference in the same dtype as plain torch."""
    if op == "full_attention" and d_out is not None and d_out.device.type == "cpu":
        options = UNSELECTING | options
    ours, truth = run(op, tensors, d_out, **options), truth_of(op, tensors, d_out, **options)
    with backends.run_by("reference"):
        plain = run(op, tensors, d_out, **options)
    for name, x in ours.items():
        if name == "block_idx":
            continue
        assert torch.equal(x.isneginf(), truth[name].isneginf()), name
        finite = (y.masked_fill(y.isneginf(), 0) for y in (x, plain[name], truth[name]))
        assert_within_tolerance(*finite, gradient=name.startswith("d "), name=name)


def _beyond(tensors: dict[str, Tensor]) -> None:
    """Queries whose last slot, and blocks, lie beyond the keys; a first slot before them."""
    for name, x in tensors.items():
        if name.endswith(".last"):
            x += 3
        if name.endswith(".first"):
            x -= 5
    if "block_idx" in tensors:
        tensors["block_idx"][..., 0] = 2**31 - 1
        tensors["block_idx"][0, ..., 0] = -(2**31)


def _scattered(tensors: dict[str, Tensor]) -> None:
    """Queries in no order."""
    for name, x in tensors.items():
        if name.endswith(".last"):
            x.copy_(x.flip(1) // 2)


@pytest.mark.parametrize("sizes", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("change", [_beyond, _scattered])
@pytest.mark.parametrize("op", ATTENTION)
def test_queries_and_blocks_anywhere(op: str, change: object, sizes: Sizes, where: str) -> None:
    if change is _scattered and op != "sliding_window_attention" and where == "cpu":
        pytest.skip("the window's backward alone took queries for consecutive")
    tensors = arguments(op, replace(sizes, dtype=torch.float32), where)
    assert callable(change)
    change(tensors)
    check(op, tensors, d_out_of(op, replace(sizes, dtype=torch.float32), where))


@pytest.mark.parametrize("heads", [1, 3])
def test_a_cache_that_no_tile_divides(heads: int, where: str) -> None:
    """T < S by an odd number: the window's backward copies rows from multiples of 16 bytes."""
    sizes = Sizes(B=1, T=33, S=38, H=heads, G=1, ranges=False)
    tensors = arguments("sliding_window_attention", sizes, where)
    check("sliding_window_attention", tensors, d_out_of("", sizes, where), window_tokens=9)


@pytest.mark.parametrize("op", ["full_attention", "block_sparse_attention"])
def test_a_sink_of_minus_infinity_is_none(op: str, where: str) -> None:
    """Rows that see nothing, too."""
    for T in (1, 33 if op == "full_attention" else 5):
        sizes = Sizes(B=1, T=T, S=36, H=2, G=1)
        tensors = arguments(op, sizes, where)
        tensors["key_range.mask"][:] = False
        tensors["key_range.mask"][:, 30:] = T > 1
        tensors["sinks"][:] = -torch.inf
        d_out = d_out_of(op, sizes, where) if T > 1 else None
        options = UNSELECTING if op == "full_attention" else {}
        found = run(op, tensors, d_out, **options)
        assert all(not x.isnan().any() for x in found.values())
        without = {n: x for n, x in tensors.items() if n != "sinks"}
        same = run(op, without, d_out, **options)
        for name, x in same.items():
            torch.testing.assert_close(found[name], x)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_of_zero_and_below(scale: float, where: str) -> None:
    sizes = Sizes(B=1, T=33, S=36, H=2, G=1)
    for op in ("full_attention", "sliding_window_attention"):
        check(op, arguments(op, sizes, where), d_out_of(op, sizes, where), scale=scale)


@pytest.mark.parametrize("queries", [1, 33], ids=["decode", "prefill"])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_at_logits_of_ten_thousand(sign: int, queries: int, where: str) -> None:
    """As the softmax of plain torch has them: the largest weighs 1, not 1 give or take 1e-3."""
    sizes = Sizes(B=1, T=queries, S=36, H=2, G=1, ranges=False)
    if where == "cuda":  # the kernels for Hopper
        sizes = replace(sizes, T=300 if queries > 1 else 1, S=300, H=8, D=128, dtype=torch.bfloat16)
    tensors = arguments("full_attention", sizes, where)
    tensors["q"] = tensors["q"].abs() * sign * 100
    tensors["k"] = tensors["k"].abs() * 100
    ours, truth = run("full_attention", tensors, None), truth_of("full_attention", tensors, None)
    q, k = (tensors[x].float() for x in ("q", "k"))
    G = sizes.G
    logits = torch.einsum("btgrd,bsgd->btgrs", q.unflatten(2, (G, -1)), k) * sizes.D**-0.5
    assert logits.abs().max() > 1e4
    seen = causal(sizes.T, sizes.S, q.device).last[0, :, None] >= torch.arange(
        sizes.S, device=where
    )
    logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
    sinks = tensors["sinks"].view(G, -1, 1).expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1].amax(3)
    blocks = torch.nn.functional.pad(weights, (0, -sizes.S % 16)).unflatten(-1, (-1, 16)).amax(-1)
    assert_within_tolerance(ours["block_scores"], blocks, truth["block_scores"], name="scores")
    plain_lse = torch.cat([logits, sinks], -1).logsumexp(-1).flatten(2)
    assert_within_tolerance(ours["lse"], plain_lse, truth["lse"], name="lse")


def test_a_range_may_hide_everything(where: str) -> None:
    q, k = torch.ones(1, 33, 2, 16, device=where), torch.ones(1, 36, 1, 16, device=where)
    last = causal(33, 36, q.device).last
    for seen in (KeyRange(last + 1, last), KeyRange(None, last - 99)):
        for T in (1, 33):
            part = seen.slab(0, T)
            out, lse, *_ = ops.full_attention(q[:, :T], k, k, key_range=part)
            assert not out.any() and lse.isneginf().all()
            out, lse = ops.sliding_window_attention(q[:, :T], k, k, key_range=part, window_tokens=5)
            assert not out.any() and lse.isneginf().all()
