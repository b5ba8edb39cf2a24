"""Decode kernels against the specification: caches longer than their sequences, ragged, padded.

What lies in a cache beyond a sequence's last token is NaN for the kernels.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hysparse_kernels import KeyRange, reference
from hysparse_kernels.triton.full import decode as full_decode_module
from hysparse_kernels.triton.full import decode_merge
from hysparse_kernels.triton.full.decode import full_decode
from hysparse_kernels.triton.sparse.decode import sparse_decode
from tests.kernels.tolerance import (
    assert_within_tolerance,
    plain_attention,
    truth_of,
    visible_blocks,
    visible_keys,
    visible_window,
)


@dataclass(frozen=True)
class Case:
    """Random inputs. ``lengths``: of the sequences. ``cache``, ``window_cache``: slots."""

    lengths: tuple[int, ...] = (90, 33)
    queries: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    v_dim: int = 16
    block_size: int = 16
    top_k: int = 4
    cache: int = 100
    window: int = 20
    window_cache: int = 24
    first: tuple[tuple[int, ...], ...] | None = None
    holes: bool = False
    sinks: bool = False
    softcap: float | None = None
    dtype: torch.dtype = torch.float32


SMALL = {
    "ragged": Case(),
    "several queries": Case(queries=3, kv_heads=1, dtype=torch.float16),
    "group of seven, values wider than keys": Case(
        heads=7, kv_heads=1, dim=20, v_dim=24, top_k=20, dtype=torch.float16
    ),
    "blocks longer than tiles": Case(block_size=64, lengths=(100, 64)),
    "sinks and soft cap": Case(sinks=True, softcap=2.0),
    "left padding": Case(first=((3, 3), (17, 17)), queries=2, kv_heads=1),
    "packed": Case(first=((0, 0, 88),), queries=3, lengths=(90,)),
    "holes": Case(holes=True),
    "a sequence of nothing": Case(lengths=(50, 0), sinks=True),
}
LARGE = {
    f"{length} keys, {dim}, groups of {group}, blocks of {block_size}, {dtype}": Case(
        lengths=(length, 1024),
        cache=1100,
        window_cache=1100,
        window=128,
        heads=2 * group,
        dim=dim,
        v_dim=min(dim, 128) if dim == 192 else dim,
        top_k=16,
        block_size=block_size,
        queries=queries,
        sinks=group > 4,
        dtype=dtype,
    )
    for length, dim, group, dtype, block_size, queries in (
        (4, 128, 4, torch.bfloat16, 64, 4),
        (63, 64, 1, torch.bfloat16, 16, 1),
        (65, 80, 7, torch.bfloat16, 32, 2),
        (257, 96, 8, torch.float16, 64, 4),
        (1023, 128, 16, torch.bfloat16, 128, 4),
        (1023, 128, 16, torch.bfloat16, 64, 1),
        (1023, 192, 4, torch.bfloat16, 64, 1),
        (257, 256, 4, torch.bfloat16, 128, 2),
        (1023, 256, 2, torch.float32, 64, 1),
        (65, 128, 4, torch.float32, 64, 4),
    )
}


@dataclass
class Inputs:
    """A case's tensors on their device: as the reference sees them, and the kernel's poisoned."""

    case: Case
    where: str

    def __post_init__(self) -> None:
        case, draw = self.case, self._draw
        batch = len(case.lengths)
        self.generator = torch.Generator().manual_seed(0)
        self.q = draw(batch, case.queries, case.heads, case.dim)
        self.k = draw(batch, case.kv_heads, case.cache, case.dim).transpose(1, 2)
        self.v = draw(batch, case.kv_heads, case.cache, case.v_dim).transpose(1, 2)
        self.window_k = draw(batch, case.window_cache, case.kv_heads, case.dim)
        self.window_v = draw(batch, case.window_cache, case.kv_heads, case.v_dim)
        self.gate_logits = draw(batch, case.queries, case.heads, 2)
        self.sinks = draw(case.heads, 2) if case.sinks else None
        self.window_lengths = tuple(min(n, case.window_cache) for n in case.lengths)
        self.key_range = self._range(case.lengths, case.cache)
        self.window_range = self._range(self.window_lengths, case.window_cache)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.case.dtype).to(self.where)

    def _range(self, lengths: tuple[int, ...], cache: int) -> KeyRange:
        case = self.case
        last = torch.tensor(lengths)[:, None] - case.queries + torch.arange(case.queries)
        first, mask = None, None
        if case.first is not None:
            behind = torch.tensor(case.lengths)[:, None] - torch.tensor(lengths)[:, None]
            first = (torch.tensor(case.first) - behind).clamp(min=0).to(self.where)
        if case.holes:
            mask = (torch.rand(len(lengths), cache, generator=self.generator) > 0.3).to(self.where)
        return KeyRange(first, last.to(self.where), mask)

    def poisoned(self, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
        x = x.clone()
        for row, length in zip(x, lengths, strict=True):
            row[length:] = torch.nan
        return x

    def options(self) -> dict[str, Any]:
        return {"scale": self.case.dim**-0.5, "softcap": self.case.softcap}


def worth(block_scores: Tensor, block_idx: Tensor) -> Tensor:
    """The true scores of selected blocks, best first."""
    scores = block_scores.gather(-1, block_idx.long().clamp(min=0))
    return scores.masked_fill(block_idx < 0, 0.0).sort(-1, descending=True).values.float()


def check_full(case: Case, where: str) -> None:
    x = Inputs(case, where)
    sinks = None if x.sinks is None else x.sinks[:, 0]
    select = {"block_size": case.block_size, "top_k_blocks": case.top_k}
    options = {**x.options(), **select, "sinks": sinks, "return_block_scores": True}
    truth = truth_of("full_attention", x.q, x.k, x.v, x.key_range, **options)
    plain = reference.full_attention(x.q, x.k, x.v, x.key_range, **options)
    plain_out = plain_attention(
        x.q, x.k, x.v, visible_keys(x.key_range, case.cache), sinks=sinks, **x.options()
    )
    k, v = (x.poisoned(y, case.lengths) for y in (x.k, x.v))
    out, lse, block_idx, scores = full_decode(x.q, k, v, x.key_range, **options)
    assert_within_tolerance(out, plain_out, truth.out)
    assert torch.equal(lse.isneginf(), truth.lse.isneginf())
    assert_within_tolerance(
        *(y.masked_fill(y.isneginf(), 0) for y in (lse, plain.lse, truth.lse)), name="lse"
    )
    assert scores is not None and block_idx is not None
    assert_within_tolerance(scores, plain.block_scores, truth.block_scores, name="scores")
    assert torch.equal(block_idx >= 0, plain.block_idx >= 0)
    assert_within_tolerance(
        worth(truth.block_scores, block_idx),
        worth(truth.block_scores, plain.block_idx),
        worth(truth.block_scores, truth.block_idx),
        name="selection",
    )


def check_sparse(case: Case, where: str) -> None:
    x = Inputs(case, where)
    blocks = -(-case.cache // case.block_size)
    kept = min(case.top_k, blocks)
    order = torch.rand(*x.q.shape[:2], case.kv_heads, blocks, generator=x.generator)
    block_idx = order.topk(kept).indices.int().to(where)
    block_idx[:, :, 0, kept // 2] = -1
    sinks = (None, None) if x.sinks is None else x.sinks.unbind(1)
    sparse = {"block_size": case.block_size, "sinks": sinks[0], **x.options()}
    window = {"window_tokens": case.window, "sinks": sinks[1], **x.options()}
    truth = truth_of(
        "gated_sum",
        truth_of("block_sparse_attention", x.q, x.k, x.v, block_idx, x.key_range, **sparse).out,
        truth_of(
            "sliding_window_attention", x.q, x.window_k, x.window_v, x.window_range, **window
        ).out,
        x.gate_logits,
    )
    seen = visible_blocks(x.key_range, case.cache, block_idx, case.block_size)
    recent = visible_window(x.window_range, case.window_cache, case.window)
    gates = x.gate_logits.sigmoid()
    plain = gates[..., :1] * plain_attention(x.q, x.k, x.v, seen, sinks=sinks[0], **x.options())
    plain += gates[..., 1:] * plain_attention(
        x.q, x.window_k, x.window_v, recent, sinks=sinks[1], **x.options()
    )
    out = sparse_decode(
        x.q,
        x.poisoned(x.k, case.lengths),
        x.poisoned(x.v, case.lengths),
        block_idx,
        x.poisoned(x.window_k, x.window_lengths),
        x.poisoned(x.window_v, x.window_lengths),
        x.gate_logits,
        x.key_range,
        x.window_range,
        block_size=case.block_size,
        window_tokens=case.window,
        sinks=x.sinks,
        **x.options(),
    )
    assert_within_tolerance(out, plain, truth)


@pytest.mark.parametrize("name", SMALL)
def test_full(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_decode_module, "SPLIT_KEYS", 32)
    monkeypatch.setattr(decode_merge, "CHUNK", 16)
    check_full(SMALL[name], where)


@pytest.mark.parametrize("name", SMALL)
def test_sparse(name: str, where: str) -> None:
    check_sparse(SMALL[name], where)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda"], indirect=True)
@pytest.mark.parametrize("name", LARGE)
def test_full_at_size(name: str, where: str) -> None:
    check_full(LARGE[name], where)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda"], indirect=True)
@pytest.mark.parametrize("name", LARGE)
def test_sparse_at_size(name: str, where: str) -> None:
    check_sparse(LARGE[name], where)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda"], indirect=True)
def test_a_long_cache_among_many_programs(where: str) -> None:
    case = replace(LARGE[next(iter(LARGE))], lengths=(9000, 4097, 70, 4), cache=9001)
    check_full(case, where)
    for _ in range(20):  # who merges is a race, which all runs have to win
        check_sparse(case, where)


def test_attention_alone_and_an_empty_batch(where: str) -> None:
    x = Inputs(SMALL["ragged"], where)
    options = {"scale": 1.0, "sinks": None, "softcap": None}
    nothing = {"block_size": None, "top_k_blocks": 0, "return_block_scores": False}
    truth = truth_of("full_attention", x.q, x.k, x.v, x.key_range, **options, **nothing)
    plain = plain_attention(x.q, x.k, x.v, visible_keys(x.key_range, x.case.cache), scale=1.0)
    out, _, block_idx, scores = full_decode(x.q, x.k, x.v, x.key_range, **options, **nothing)
    assert_within_tolerance(out, plain, truth.out)
    assert block_idx is None and scores is None
    q, k, v = x.q[:0], x.k[:0], x.v[:0]
    key_range = KeyRange(None, x.key_range.last[:0])
    selecting = {"block_size": 16, "top_k_blocks": 3, "return_block_scores": True}
    out, _, block_idx, scores = full_decode(q, k, v, key_range, **options, **selecting)
    assert out.shape == q.shape and block_idx is not None and block_idx.shape == (0, 1, 2, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda"], indirect=True)
def test_in_a_cuda_graph_the_lengths_may_change(where: str) -> None:
    case = replace(LARGE[next(iter(LARGE))], queries=1)
    x = Inputs(case, where)
    block_idx = torch.arange(3, device=where).int().expand(2, 1, 2, 3)
    options = {"sinks": None, **x.options()}

    def run() -> list[Tensor | None]:
        result = full_decode(
            x.q,
            x.k,
            x.v,
            x.key_range,
            block_size=64,
            top_k_blocks=4,
            return_block_scores=False,
            **options,
        )
        sparse = sparse_decode(
            x.q,
            x.k,
            x.v,
            block_idx,
            x.window_k,
            x.window_v,
            x.gate_logits,
            x.key_range,
            x.window_range,
            block_size=64,
            window_tokens=100,
            **options,
        )
        return [*result, sparse]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for length in (100, 800, 1):
        x.key_range.last.fill_(length)
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
