"""Block-sparse attention in Triton, forward and backward, held to the law."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hysparse_kernels import KeyRange, reference
from hysparse_kernels.triton.sparse import backward as backward_module
from hysparse_kernels.triton.sparse.backward import sparse_backward
from hysparse_kernels.triton.sparse.forward import sparse_forward
from hysparse_kernels.triton.sparse.pairs import Pairs, pairs_of
from hysparse_kernels.triton.sparse.query_tiles import query_tiles
from tests.kernels.tolerance import assert_within_tolerance, plain_attention, visible_blocks

# NumPy warns where the interpreter turns a loop's bound, a tensor of one element, into an int.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@dataclass(frozen=True)
class Case:
    """Random inputs; neighbouring queries choose much the same blocks, pads lie anywhere."""

    queries: int = 19
    tokens: int = 40
    batch: int = 2
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    v_dim: int = 16
    block: int = 16
    top_k: int = 2
    first: str = "none"
    holes: bool = False
    sinks: bool = False
    softcap: float | None = None
    gate: bool = False
    strided: bool = False
    alike: float = 0.7

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def key_range(self, device: str) -> KeyRange:
        """``queries`` at the end of ``tokens``, left padded or packed in documents."""
        last = torch.arange(self.tokens - self.queries, self.tokens, device=device)[None]
        first = None
        if self.first == "padding":  # the second sequence's first queries see nothing
            first = last.new_tensor([[0], [self.tokens - self.queries + 3]])
            first = first[-self.batch :].expand(self.batch, self.queries)
        if self.first == "packed":
            documents = [self.tokens * n // 5 for n in (0, 2, 3)]
            first = sum(
                torch.where(last >= n, n - m, 0)
                for m, n in zip([0, *documents], documents, strict=False)
            )
        mask = None
        if self.holes:
            mask = torch.rand(self.batch, self.tokens, device=device) < 0.7
        return KeyRange(first, last, mask)

    def lists(self, device: str) -> Tensor:
        """(B, T, G, K) int32: a list in common, but for some random ones, shuffled, with pads."""
        shape = self.batch, self.queries, self.kv_heads
        blocks = -(-self.tokens // self.block)
        count = max(blocks, self.top_k)
        shared = torch.rand(self.batch, 1, self.kv_heads, count, device=device).expand(*shape, -1)
        own = torch.rand(*shape, count, device=device)
        alike = torch.rand(*shape, 1, device=device) < self.alike
        chosen = torch.where(alike, shared, own).argsort(-1)[..., : self.top_k]
        chosen = chosen.gather(-1, torch.rand(chosen.shape, device=device).argsort(-1))
        pad = (torch.rand(chosen.shape, device=device) < 0.2) | (chosen >= blocks)
        return chosen.masked_fill(pad, -1).int()

    def inputs(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output."""
        shapes = [
            (self.batch, self.queries, self.heads, self.dim),
            (self.batch, self.tokens, self.kv_heads, self.dim),
            (self.batch, self.tokens, self.kv_heads, self.v_dim),
            (self.batch, self.queries, self.heads, self.v_dim),
        ]
        made = []
        for B, T, H, D in shapes:
            x = torch.randn((B, H, T, D) if self.strided else (B, T, H, D), device=device)
            made.append((x.transpose(1, 2) if self.strided else x).to(dtype))
        q, k, v, d_out = made
        return q, k, v, d_out

    def options(self, device: str) -> dict[str, Any]:
        sinks = torch.linspace(-1, 2, self.heads, device=device) if self.sinks else None
        return {
            "block_size": self.block,
            "scale": self.dim**-0.5,
            "sinks": sinks,
            "softcap": self.softcap,
        }


SMALL = {
    "plain": Case(),
    "padding, sinks, a group of three": Case(first="padding", sinks=True, group=3, gate=True),
    "packed, holes, softcap": Case(first="packed", holes=True, softcap=1.5, v_dim=24, group=1),
    "blocks of 128 in two parts": Case(block=128, tokens=150, batch=1, strided=True),
    "few queries a tile": Case(queries=9, kv_heads=1, group=16, batch=1, sinks=True),
}
LARGE = {
    name: Case(
        queries=queries,
        tokens=tokens,
        kv_heads=heads[1],
        group=heads[0] // heads[1],
        top_k=5,
        **sizes,
    )
    for (queries, tokens), heads, name, sizes in [
        ((1, 1), (4, 1), "one token", {"dim": 64, "v_dim": 64, "block": 64}),
        ((63, 63), (8, 2), "63", {"dim": 128, "v_dim": 128, "block": 16, "sinks": True}),
        ((65, 130), (7, 1), "65", {"dim": 80, "v_dim": 80, "block": 32, "gate": True}),
        ((257, 257), (16, 1), "257", {"dim": 96, "v_dim": 96, "block": 64, "first": "packed"}),
        ((1023, 1023), (2, 2), "1023", {"dim": 192, "v_dim": 128, "block": 64, "holes": True}),
        ((257, 1023), (8, 1), "wide", {"dim": 256, "v_dim": 256, "block": 128, "softcap": 20.0}),
        ((1023, 2047), (8, 2), "long", {"dim": 128, "v_dim": 128, "block": 64, "gate": True}),
        ((1023, 1023), (8, 2), "padded", {"dim": 64, "v_dim": 64, "block": 64, "first": "padding"}),
        (
            (513, 700),
            (32, 2),
            "sixteen",
            {"dim": 128, "v_dim": 128, "block": 128, "first": "packed"},
        ),
        ((300, 300), (8, 2), "strided", {"dim": 128, "v_dim": 64, "block": 128, "strided": True}),
    ]
}


HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16
IN_THE_INTERPRETER = [(name, HALF) for name in SMALL] + [("plain", FULL)]
ON_A_GPU = [(name, BRAIN) for name in SMALL | LARGE] + [(name, FULL) for name in (*SMALL, "257")]
ALL = [
    pytest.param((SMALL | LARGE)[name], dtype, id=f"{name}, {str(dtype)[6:]}", marks=marks)
    for name, dtype in dict.fromkeys(IN_THE_INTERPRETER + ON_A_GPU)
    for marks in [() if (name, dtype) in IN_THE_INTERPRETER else pytest.mark.gpu]
]


@pytest.mark.parametrize(("case", "dtype"), ALL)
def test_forward(case: Case, dtype: torch.dtype, where: str) -> None:
    torch.manual_seed(0)
    q, k, v, _ = case.inputs(where, dtype)
    block_idx, key_range, options = case.lists(where), case.key_range(where), case.options(where)
    result = sparse_forward(q, k, v, block_idx, key_range, **options)
    check_forward(result, q, k, v, block_idx, key_range, options)


def check_forward(
    result: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    key_range: KeyRange,
    options: dict[str, Any],
) -> None:
    truth = reference.block_sparse_attention(
        q.double(), k.double(), v.double(), block_idx, key_range, **options
    )
    visible = visible_blocks(key_range, k.shape[1], block_idx, options["block_size"])
    rest = {name: options[name] for name in ("scale", "sinks", "softcap")}
    assert_within_tolerance(result.out, plain_attention(q, k, v, visible, **rest), truth.out)
    plain = reference.block_sparse_attention(q, k, v, block_idx, key_range, **options)
    seen = truth.lse.isfinite()
    assert result.lse.isneginf().eq(~seen).all()
    assert_within_tolerance(result.lse[seen], plain.lse[seen], truth.lse[seen], name="lse")


@pytest.mark.parametrize(("case", "dtype"), ALL)
def test_backward(case: Case, dtype: torch.dtype, where: str) -> None:
    check_backward(case, dtype, where)


def check_backward(case: Case, dtype: torch.dtype, where: str) -> None:
    torch.manual_seed(0)
    q, k, v, d_out = case.inputs(where, dtype)
    block_idx, key_range, options = case.lists(where), case.key_range(where), case.options(where)
    gate = torch.rand(q.shape[:3], device=where) if case.gate else None
    d_branch = d_out.double() * (1.0 if gate is None else gate.double()[..., None])

    wide = [x.double().requires_grad_() for x in (q, k, v)]
    wide_sinks = None if options["sinks"] is None else options["sinks"].double().requires_grad_()
    truth = reference.block_sparse_attention(
        *wide, block_idx, key_range, **{**options, "sinks": wide_sinks}
    )
    truth.out.backward(d_branch)

    narrow = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    sinks = None if wide_sinks is None else options["sinks"].clone().requires_grad_()
    visible = visible_blocks(key_range, k.shape[1], block_idx, options["block_size"])
    plain = plain_attention(
        *narrow, visible, scale=options["scale"], sinks=sinks, softcap=options["softcap"]
    )
    plain.backward(d_branch.to(dtype))

    result = sparse_forward(q, k, v, block_idx, key_range, **options)
    delta = (d_branch * result.out.double()).sum(-1).float()
    *grads, d_sinks = sparse_backward(
        d_out, q, k, v, block_idx, result.lse, delta, key_range, gate=gate, **options
    )
    for name, ours, theirs, true in zip("qkv", grads, narrow, wide, strict=True):
        assert ours.dtype == dtype
        assert theirs.grad is not None and true.grad is not None
        assert_within_tolerance(ours, theirs.grad, true.grad, gradient=True, name=f"d{name}")
    if sinks is not None and wide_sinks is not None:
        assert sinks.grad is not None and wide_sinks.grad is not None and d_sinks is not None
        assert_within_tolerance(d_sinks, sinks.grad, wide_sinks.grad, gradient=True, name="dsinks")


def test_a_small_workspace_takes_several_passes(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []

    def counted(*args: Any, **options: Any) -> Pairs:
        passes.append((pairs := pairs_of(*args, **options)).passes)
        return pairs

    monkeypatch.setattr(backward_module, "pairs_of", counted)
    monkeypatch.setattr(backward_module, "WORKSPACE", 9000)
    monkeypatch.setattr(backward_module, "PROGRAMS", 2)
    check_backward(Case(alike=0.0, first="packed"), HALF, where)
    assert max(passes) > 1


@pytest.mark.parametrize("first", ["none", "padding", "packed"])
@pytest.mark.parametrize("with_rare", [False, True])
def test_tiles_unite_their_queries_lists(where: str, first: str, with_rare: bool) -> None:
    torch.manual_seed(0)
    case = Case(batch=2, kv_heads=1, queries=37, tokens=60, first=first, group=16, top_k=3)
    block_idx, key_range = case.lists(where), case.key_range(where)
    tiles = query_tiles(
        block_idx,
        key_range,
        block_size=case.block,
        num_keys=case.tokens,
        group=case.group,
        with_rare=with_rare,
    )
    for b in range(case.batch):
        for tile in range(tiles.counts.shape[2]):
            chosen: dict[int, int] = {}
            for i in range(min(tiles.queries, case.queries - tile * tiles.queries)):
                t = tile * tiles.queries + i
                begin = 0
                if key_range.first is not None:
                    begin = int(key_range.first.expand(case.batch, -1)[b, t])
                for block in block_idx[b, t, 0].tolist():
                    start = begin + block * case.block
                    if block >= 0 and start <= int(key_range.last[0, t]):
                        chosen[start] = chosen.get(start, 0) | 1 << i
            few = tiles.queries // 4 if with_rare else 0
            common = [n for n in sorted(chosen) if chosen[n].bit_count() > few]
            rare = [n for n in sorted(chosen) if chosen[n].bit_count() <= few]
            assert tiles.counts[b, 0, tile] == len(common)
            assert tiles.rare[b, 0, tile] == len(rare)
            assert tiles.pairs[b, 0, tile] == sum(chosen[n].bit_count() for n in rare)
            assert tiles.starts[b, 0, tile, : len(chosen)].tolist() == common + rare
            members = tiles.members[b, 0, tile, : len(chosen)].tolist()
            assert members == [chosen[n] for n in common + rare]


@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"queries": 0}, {"top_k": 0}, {"tokens": 0, "queries": 0}]
)
def test_nothing_to_attend_to(where: str, empty: dict[str, int]) -> None:
    case = replace(Case(), **empty)
    q, k, v, d_out = case.inputs(where, torch.float16)
    block_idx, key_range, options = case.lists(where), case.key_range(where), case.options(where)
    result = sparse_forward(q, k, v, block_idx, key_range, **options)
    assert result.out.eq(0).all() and result.lse.isneginf().all()
    dq, dk, dv, _ = sparse_backward(
        d_out, q, k, v, block_idx, result.lse, result.lse, key_range, **options
    )
    assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape
    assert dq.eq(0).all() and dk.eq(0).all() and dv.eq(0).all()
