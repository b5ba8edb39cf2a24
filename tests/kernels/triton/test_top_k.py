"""The TopK kernel against the specification's selection, on the same maxima: equal, ties too."""

import pytest
import torch
from torch import Tensor

from hysparse_kernels import KeyRange
from hysparse_kernels.selection import select_blocks
from hysparse_kernels.triton.full.top_k import Maxima, select
from tests.kernels.tolerance import assert_within_tolerance

BLOCK = 4
SMALL = {
    "ties, pads": {"heads": 4, "blocks": 20, "top_k": 3},
    "longer lists, scores": {"blocks": 40, "top_k": 20, "whole": False, "scores": True},
    "fewer blocks than K, two tiles": {"heads": 7, "blocks": 5, "queries": 33},
    "rows whose blocks count from their own first slot": {"packed": True, "blocks": 12},
    "several warps a query": {"blocks": 260, "queries": 3},
}
LARGE = {
    "a batch of groups": {
        "batch": 2,
        "heads": 32,
        "kv_heads": 8,
        "blocks": 70,
        "queries": 300,
        "scores": True,
    },
    "long": {"heads": 8, "kv_heads": 2, "blocks": 1100, "queries": 257, "scores": True},
    "longest lists": {"heads": 8, "kv_heads": 8, "blocks": 300, "top_k": 64},
    "one block each": {"heads": 16, "blocks": 33, "queries": 1023, "top_k": 1},
}


def check(
    where: str,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    blocks: int = 20,
    queries: int = 5,
    top_k: int = 16,
    whole: bool = True,
    packed: bool = False,
    scores: bool = False,
) -> None:
    g = torch.Generator().manual_seed(0)
    maxima = torch.randn(batch, heads, blocks, queries, generator=g)
    lse = torch.randn(batch, heads, queries, generator=g).transpose(1, 2)
    if whole:  # many ties
        maxima, lse = (2 * maxima).round(), (2 * lse).round()
    lse[0, 1 % queries] = maxima[:, :, 2] = -torch.inf
    last = torch.randint(-3, blocks * BLOCK, (batch, queries), generator=g)
    first = torch.randint(0, 9, (1, queries), generator=g) if packed else None
    start = torch.zeros_like(last) if first is None else first
    seen = torch.arange(blocks) <= ((last - start).div(BLOCK, rounding_mode="floor"))[..., None]
    group_of = (batch, queries, kv_heads, heads // kv_heads)
    logits = (
        maxima.permute(0, 3, 1, 2)
        .unflatten(2, group_of[2:])
        .masked_fill(~seen[:, :, None, None], -torch.inf)
    )
    lse_of = lse.unflatten(2, group_of[2:])[..., None]

    def log_scores(logits: Tensor, lse_of: Tensor) -> Tensor:
        relative = logits - lse_of.masked_fill(lse_of.isneginf(), 0.0)
        return relative.masked_fill(lse_of.isneginf(), -torch.inf).amax(3)

    garbage = maxima.masked_fill(~seen.permute(0, 2, 1)[:, None], torch.nan).to(where)
    wide_idx = torch.full((batch, queries, kv_heads + 1, top_k), -7, dtype=torch.int32).to(where)
    block_idx = wide_idx[:, :, 1:]
    block_scores = torch.empty(*group_of[:3], blocks, device=where) if scores else None
    key_range = KeyRange(None if first is None else first.to(where), last.to(where))
    peaks = torch.zeros_like(lse).to(where)
    given = Maxima(garbage, peaks, lse.to(where))
    select(given, key_range, block_idx, block_scores, block_size=BLOCK)

    expected = log_scores(logits, lse_of)
    assert torch.equal(block_idx.cpu(), select_blocks(expected, top_k))
    assert wide_idx[:, :, 0].eq(-7).all()
    if block_scores is not None:
        truth = log_scores(logits.double(), lse_of.double()).exp()
        assert_within_tolerance(block_scores.cpu(), expected.exp(), truth, name="scores")


@pytest.mark.parametrize("name", SMALL)
def test_selection(name: str, where: str) -> None:
    check(where, **SMALL[name])  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda"], indirect=True)
@pytest.mark.parametrize("name", LARGE)
def test_selection_among_many(name: str, where: str) -> None:
    check(where, **LARGE[name])  # type: ignore[arg-type]


def test_an_empty_batch(where: str) -> None:
    block_idx = torch.empty(0, 3, 2, 4, dtype=torch.int32, device=where)
    maxima, lse = torch.empty(0, 4, 5, 3, device=where), torch.empty(0, 3, 4, device=where)
    key_range = KeyRange(None, torch.arange(3, device=where)[None])
    select(Maxima(maxima, lse, lse), key_range, block_idx, None, block_size=BLOCK)
