"""Full attention in Triton: outputs, block maxima and gradients, held to the law."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hysparse_kernels import KeyRange, reference
from hysparse_kernels.triton.full.backward import full_backward
from hysparse_kernels.triton.full.forward import full_forward
from hysparse_kernels.triton.full.top_k import Maxima
from tests.kernels.tolerance import assert_within_tolerance, plain_attention, visible_keys

# NumPy warns where the interpreter turns a loop's bound, a tensor of one element, into an int.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@dataclass(frozen=True)
class Case:
    """Random inputs; the queries are the last of the tokens."""

    queries: int = 37
    tokens: int = 37
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    v_dim: int = 16
    batch: int = 1
    block: int = 16
    first: str = "none"
    holes: bool = False
    sinks: bool = False
    softcap: float | None = None
    strided: bool = False
    scale: float = 0.25

    def key_range(self, device: str) -> KeyRange:
        last = torch.arange(self.tokens - self.queries, self.tokens, device=device)[None]
        first = mask = None
        if self.first == "padding":  # the last sequence's first queries see nothing
            first = torch.zeros(self.batch, self.queries, dtype=torch.int64, device=device)
            first[-1] = self.tokens - self.queries + 1 + self.queries // 3
        if self.first == "packed":
            begins = torch.tensor([0, self.tokens // 5, self.tokens * 2 // 3], device=device)
            first = begins[torch.searchsorted(begins, last, right=True) - 1]
        if self.first == "window":  # each query counts its own blocks
            first = (last - 20).clamp(min=0)
        if self.holes:
            mask = torch.rand(self.batch, self.tokens, device=device) < 0.7
        return KeyRange(first, last, mask)

    def inputs(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradient of the output."""
        shapes = (
            (self.queries, self.heads, self.dim),
            (self.tokens, self.kv_heads, self.dim),
            (self.tokens, self.kv_heads, self.v_dim),
            (self.queries, self.heads, self.v_dim),
        )
        made = []
        for T, H, D in shapes:
            shape = (self.batch, H, T, D) if self.strided else (self.batch, T, H, D)
            x = torch.randn(shape, device=device).to(dtype)
            made.append(x.transpose(1, 2) if self.strided else x)
        return made

    def options(self, device: str) -> dict[str, Any]:
        sinks = torch.linspace(-1, 2, self.heads, device=device) if self.sinks else None
        return {"scale": self.scale, "sinks": sinks, "softcap": self.softcap}


SMALL = {
    "plain": Case(),
    "a cache, groups of three, sinks": Case(queries=9, tokens=45, heads=3, kv_heads=1, sinks=True),
    "softcap, values wider than keys": Case(softcap=1.5, v_dim=24, heads=2, sinks=True),
    "padding": Case(first="padding", batch=2, heads=2, kv_heads=1, strided=True),
    "padding, sinks": Case(first="padding", heads=1, kv_heads=1, sinks=True),
    "packed": Case(first="packed", queries=70, tokens=70, heads=1, kv_heads=1, block=32),
    "packed, holes": Case(first="packed", heads=2, holes=True, batch=2, softcap=4.0),
    "blocks wider than tiles": Case(queries=150, tokens=150, heads=1, kv_heads=1, block=128),
    "each its own blocks": Case(queries=30, tokens=30, first="window", heads=1, kv_heads=1),
    "negative scale": Case(scale=-0.25, heads=2),
}
_64 = {"scale": 0.125, "block": 64, "batch": 2}
LARGE = {
    "1, D 80": Case(1, 1, 4, 1, 80, 80, **_64),
    "63, D 64, groups of 16": Case(63, 63, 16, 1, 64, 64, sinks=True, **_64),
    "65, D 256": Case(65, 65, 4, 2, 256, 256, strided=True, **_64),
    "257, D 96, cap": Case(257, 257, 4, 4, 96, 96, softcap=5.0, **_64),
    "257 of 1500, D 128": Case(257, 1500, 8, 2, 128, 128, sinks=True, **_64),
    "1023, D 192/128": Case(1023, 1023, 4, 1, 192, 128, first="packed", **_64),
    "1023, D 128": Case(1023, 1023, 7, 1, 128, 128, first="padding", sinks=True, **_64),
    "1023, D 128, holes": Case(1023, 1023, 8, 2, 128, 128, first="packed", holes=True, **_64),
}
HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16
# Each case compiles kernels of its own on a GPU: a second or more each.
ALL = [(name, HALF, "interpreted") for name in SMALL]
ALL += [(name, FULL, "interpreted") for name in ("plain", "packed, holes")]
ALL += [(name, BRAIN, "gpu") for name in (*LARGE, "packed, holes", "each its own blocks")]
ALL += [("63, D 64, groups of 16", dtype, "gpu") for dtype in (HALF, FULL)]
PARAMS = [
    pytest.param(
        (SMALL | LARGE)[name],
        dtype,
        "cpu" if place == "interpreted" else "cuda",
        id=f"{name}, {str(dtype)[6:]}, {place}",
        marks=pytest.mark.gpu if place == "gpu" else (),
    )
    for name, dtype, place in ALL
]
in_all_cases = pytest.mark.parametrize(("case", "dtype", "where"), PARAMS, indirect=["where"])


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_range: KeyRange, block: int | None, **options: Any
) -> tuple[Tensor, Tensor, Maxima | None]:
    """out, lse and, with ``block``, the maxima."""
    (B, T, H, _), S = q.shape, k.shape[1]
    out = q.new_empty(B, T, H, v.shape[3])
    lse = q.new_empty(B, T, H, dtype=torch.float32)
    maxima = None
    if block is not None:
        tops = lse.new_empty(B, H, -(-S // block), T)
        maxima = Maxima(tops, torch.empty_like(lse), torch.empty_like(lse))
    full_forward(q, k, v, key_range, out, lse, maxima, block_size=block or 64, **options)
    return out, lse, maxima


def scores_of(maxima: Maxima, key_range: KeyRange, case: Case) -> Tensor:
    """Eq. 3 after the group-wise maximum, (B, T, G, N), of what ``full_forward`` leaves."""
    first = 0 if key_range.first is None else key_range.first
    tops, peaks, totals = maxima
    blocks = torch.arange(tops.shape[2], device=tops.device)
    written = blocks <= ((key_range.last - first)[..., None] // case.block)
    logits = tops.permute(0, 3, 1, 2).where(written[:, :, None], -torch.inf)
    totals = totals.masked_fill(totals.isneginf(), 0.0)
    scores = (logits - peaks[..., None] - totals[..., None]).exp()
    return scores.unflatten(2, (case.kv_heads, -1)).amax(3)


def plain_lse_and_scores(
    q: Tensor, k: Tensor, key_range: KeyRange, case: Case, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same from logits in the inputs' dtype."""
    queries = q.unflatten(2, (case.kv_heads, -1))
    logits = torch.einsum("btgrd,bsgd->btgrs", queries, k) * case.scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    visible = visible_keys(key_range, case.tokens)
    logits = logits.masked_fill(~visible[:, :, :, None], -torch.inf).flatten(2, 3).float()
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float())
    weights = (logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    weights = weights.unflatten(2, (case.kv_heads, -1)).amax(3)  # [B, T, G, S]
    first = torch.zeros_like(key_range.last) if key_range.first is None else key_range.first
    slots = torch.arange(case.tokens, device=q.device) - first[..., None]
    block = (slots.div(case.block, rounding_mode="floor").clamp(min=-1) + 1)[:, :, None]
    scores = weights.new_zeros(*weights.shape[:3], -(-case.tokens // case.block) + 1)
    scores.scatter_reduce_(3, block.expand_as(weights), weights, "amax")
    return lse, scores[..., 1:]


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_every_block_size(where: str, block: int) -> None:
    dim = 16 if where == "cpu" else 64
    case = Case(150, 150, 2, 1, dim, dim, block=block, sinks=True)
    test_outputs_and_scores(case, torch.float16, where)


@in_all_cases
def test_outputs_and_scores(case: Case, dtype: torch.dtype, where: str) -> None:
    torch.manual_seed(0)
    q, k, v, _ = case.inputs(where, dtype)
    key_range, options = case.key_range(where), case.options(where)
    out, lse, maxima = forward(q, k, v, key_range, case.block, **options)
    assert maxima is not None

    truth = reference.full_attention(
        *(x.double() for x in (q, k, v)),
        key_range,
        block_size=case.block,
        top_k_blocks=0,
        return_block_scores=True,
        **options,
    )
    plain = plain_attention(q, k, v, visible_keys(key_range, case.tokens), **options)
    plain_lse, plain_scores = plain_lse_and_scores(q, k, key_range, case, options["sinks"])
    assert_within_tolerance(out, plain, truth.out)
    seen = truth.lse.isfinite()
    assert lse.isneginf().eq(~seen).all()
    assert_within_tolerance(lse[seen], plain_lse[seen], truth.lse[seen], name="lse")
    assert truth.block_scores is not None
    scores = scores_of(maxima, key_range, case)
    assert_within_tolerance(scores, plain_scores, truth.block_scores, name="scores")

    alone, lse_alone, _ = forward(q, k, v, key_range, None, **options)
    assert_within_tolerance(alone, plain, truth.out, name="out without maxima")
    assert_within_tolerance(
        lse_alone[seen], plain_lse[seen], truth.lse[seen], name="lse without maxima"
    )


@in_all_cases
def test_gradients(case: Case, dtype: torch.dtype, where: str) -> None:
    torch.manual_seed(0)
    q, k, v, d_out = case.inputs(where, dtype)
    key_range, options = case.key_range(where), case.options(where)
    sinks = options.pop("sinks")

    wide = [x.double().requires_grad_() for x in (q, k, v)]
    wide_sinks = None if sinks is None else sinks.double().requires_grad_()
    truth = reference.full_attention(
        *wide,
        key_range,
        sinks=wide_sinks,
        block_size=None,
        top_k_blocks=0,
        return_block_scores=False,
        **options,
    )
    truth.out.backward(d_out.double())

    narrow = [x.clone().requires_grad_() for x in (q, k, v)]
    narrow_sinks = None if sinks is None else sinks.clone().requires_grad_()
    visible = visible_keys(key_range, case.tokens)
    plain_attention(*narrow, visible, sinks=narrow_sinks, **options).backward(d_out)

    out, lse, _ = forward(q, k, v, key_range, None, sinks=sinks, **options)
    causal = case.queries == case.tokens and case.first == "none" and not case.holes
    for plain_causal in {False, causal}:
        *grads, d_sinks = full_backward(
            d_out, q, k, v, out, lse, key_range, plain_causal=plain_causal, sinks=sinks, **options
        )
        for name, ours, theirs, true in zip("qkv", grads, narrow, wide, strict=True):
            assert ours.dtype == q.dtype
            assert theirs.grad is not None and true.grad is not None
            assert_within_tolerance(ours, theirs.grad, true.grad, gradient=True, name=f"d{name}")
        if narrow_sinks is not None and wide_sinks is not None:
            assert narrow_sinks.grad is not None and wide_sinks.grad is not None
            assert_within_tolerance(
                d_sinks, narrow_sinks.grad, wide_sinks.grad, gradient=True, name="dsinks"
            )


def test_slabs_of_queries_make_the_whole(where: str) -> None:
    torch.manual_seed(0)
    case = SMALL["packed"]
    q, k, v, _ = case.inputs(where, torch.float16)
    key_range, options = case.key_range(where), case.options(where)
    out, lse, maxima = forward(q, k, v, key_range, case.block, **options)
    assert maxima is not None
    parts, lse_parts = torch.empty_like(out), torch.empty_like(lse)
    for begin in range(0, case.queries, 32):
        end = min(begin + 32, case.queries)
        slab = q[:, begin:end], k, v, key_range.slab(begin, end)
        whole = maxima.slab(begin, end, maxima.blocks[..., begin:end])
        of_part = Maxima(
            torch.empty_like(whole.blocks), *(torch.empty_like(lse)[:, begin:end] for _ in range(2))
        )
        full_forward(
            *slab,
            parts[:, begin:end],
            lse_parts[:, begin:end],
            of_part,
            block_size=case.block,
            **options,
        )
        torch.testing.assert_close(*(scores_of(x, slab[3], case) for x in (of_part, whole)))
    torch.testing.assert_close(parts, out)
    torch.testing.assert_close(lse_parts, lse)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"tokens": 0}])
def test_nothing_to_attend_to(where: str, empty: dict[str, int]) -> None:
    case = replace(Case(sinks=True), **empty)
    q, k, v, d_out = case.inputs(where, torch.float16)
    key_range, options = case.key_range(where), case.options(where)
    out, lse, _ = forward(q, k, v, key_range, case.block, **options)
    assert out.eq(0).all() and lse.eq(options["sinks"]).all()
    grads = full_backward(d_out, q, k, v, out, lse, key_range, plain_causal=False, **options)
    for grad, x in zip(grads, (q, k, v, options["sinks"]), strict=True):
        assert grad is not None and grad.shape == x.shape and grad.eq(0).all()
