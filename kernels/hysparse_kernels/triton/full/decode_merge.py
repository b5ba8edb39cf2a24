"""The second half of a decode step: merge the splits of the keys, and select blocks."""

import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import strides_of
from hysparse_kernels.triton.full.top_k import NOTHING, ascending, best_of, ranked
from hysparse_kernels.triton.tiles import LOG2_E

CHUNK = 512  # blocks that are ranked at a time


def merge_splits(
    partial_out: Tensor,
    partial_sum: Tensor,
    maxima: Tensor | None,
    sinks: Tensor | None,
    key_range: KeyRange,
    out: Tensor,
    lse: Tensor,
    block_idx: Tensor | None,
    scores: Tensor | None,
    *,
    block_size: int | None,
) -> None:
    """Merge what each split of the keys gave into the attention, and select blocks (eq. 1-3).

    Args:
        partial_out: (splits, B, T, H, Dv) float32, each split's unnormalised output.
        partial_sum: (2, splits, B, T, H) float32, its largest logit, and its denominator.
        maxima: (B, T, H, N) float32, the largest logit of each block a query sees; or None.
        sinks: (H,) logits added to the denominator, or None.
        out: (B, T, H, Dv), lse: (B, T, H) float32, contiguous, written.
        block_idx: (B, T, G, K) int32, scores: (B, T, G, N) float32, contiguous, written; or None.
        block_size: tokens in a key block, where ``maxima`` are given.
    """
    splits, B, T, H, Dv = partial_out.shape
    selection = block_idx if block_idx is not None else scores
    G = H if selection is None else selection.shape[2]
    top_k_blocks = 0 if block_idx is None else block_idx.shape[3]
    kept = max(16, triton.next_power_of_2(top_k_blocks))
    first, last = key_range.first, key_range.last
    _merge[(B * T * H + (B * T * G if maxima is not None else 0),)](
        partial_out,
        partial_sum,
        maxima,
        sinks,
        sinks.stride(0) if sinks is not None else 0,
        first,
        last,
        *strides_of(first),
        *strides_of(last),
        out,
        lse,
        block_idx,
        scores,
        B,
        T,
        G,
        maxima.shape[3] if maxima is not None else 0,
        top_k_blocks,
        splits,
        GROUP=H // G,
        BLOCK=block_size,
        DV=Dv,
        PADDED_DV=triton.next_power_of_2(Dv),
        HEADS=triton.next_power_of_2(H // G),
        KEPT=kept,
        CHUNK=max(CHUNK, kept),
        num_warps=4,
    )


@triton.jit
def _row_sum(partial_sum, sinks, stride_sh, row, rows, splits, H):
    """Peak and total of rows (M,) over all splits, with their sinks."""
    PARTS: tl.constexpr = 64
    peaks = tl.full([PARTS, row.shape[0]], -1e30, tl.float32)
    totals = tl.zeros([PARTS, row.shape[0]], tl.float32)
    for begin in range(0, splits, PARTS):
        part = begin + tl.arange(0, PARTS)[:, None]
        at = partial_sum + part.to(tl.int64) * rows + row[None, :]
        peak = tl.load(at, mask=part < splits, other=-1e30)
        total = tl.load(at + splits * rows, mask=part < splits, other=0.0)
        higher = tl.maximum(peaks, peak)
        totals = totals * _decay(peaks - higher) + total * _decay(peak - higher)
        peaks = higher
    peak = tl.max(peaks, 0)
    total = tl.sum(totals * _decay(peaks - peak[None, :]), 0)
    if sinks is not None:
        sink = tl.load(sinks + row % H * stride_sh).to(tl.float32)
        higher = tl.maximum(peak, sink)
        total = total * _decay(peak - higher) + _decay(sink - higher)
        peak = higher
    return peak, total


@triton.jit
def _decay(x):
    return tl.exp2(x * LOG2_E)


@triton.jit(do_not_specialize=["stride_fb", "stride_lb", "B", "T", "G", "N", "K", "splits"])
def _merge(
    partial_out, partial_sum, maxima, sinks, stride_sh,
    first, last, stride_fb, stride_ft, stride_lb, stride_lt,
    out, lse, block_idx, scores, B, T, G, N, K, splits,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
    HEADS: tl.constexpr, KEPT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The first B * T * H programs merge a head's row each, the others select a group's blocks."""
    pid = tl.program_id(0).to(tl.int64)
    rows = B.to(tl.int64) * T * (G * GROUP)
    if pid < rows:
        _merge_row(
            partial_out, partial_sum, sinks, stride_sh, out, lse, pid, rows, splits, G * GROUP,
            DV, PADDED_DV,
        )  # fmt: skip
    if maxima is not None and pid >= rows:
        g, t, b = pid % G, (pid - rows) // G % T, (pid - rows) // G // T
        head = tl.arange(0, HEADS)
        row = (b * T + t) * (G * GROUP) + g * GROUP + tl.where(head < GROUP, head, 0)
        peak, total = _row_sum(partial_sum, sinks, stride_sh, row, rows, splits, G * GROUP)
        end = tl.load(last + b * stride_lb + t * stride_lt)
        start = end * 0
        if first is not None:
            start = tl.maximum(tl.load(first + b * stride_fb + t * stride_ft), 0)
        seen = tl.where(end >= start, (end - start) // BLOCK + 1, 0)
        _select(
            maxima, row, peak, total, tl.minimum(seen, N).to(tl.int32), block_idx, scores,
            (b * T + t) * G + g, N, K, KEPT, CHUNK,
        )  # fmt: skip


@triton.jit
def _merge_row(
    partial_out, partial_sum, sinks, stride_sh, out, lse, row, rows, splits, H,
    DV: tl.constexpr, PADDED_DV: tl.constexpr,
):  # fmt: skip
    """Write a head's output and lse."""
    PARTS: tl.constexpr = 32
    this = row + tl.arange(0, 1)
    peak, total = _row_sum(partial_sum, sinks, stride_sh, this, rows, splits, H)
    unseen = total == 0
    total = tl.where(unseen, 1.0, total)
    tl.store(lse + this, tl.where(unseen, float("-inf"), peak + tl.log(total)))
    dv = tl.arange(0, PADDED_DV)
    acc = tl.zeros([PARTS, PADDED_DV], tl.float32)
    for begin in range(0, splits, PARTS):
        part = begin + tl.arange(0, PARTS)
        at = part.to(tl.int64) * rows + row
        weight = _decay(tl.load(partial_sum + at, mask=part < splits, other=-1e30) - peak)
        known = (part < splits)[:, None] & (dv < DV)[None, :]
        at = partial_out + at[:, None] * DV + dv
        acc += weight[:, None] * tl.load(at, mask=known, other=0.0)
    acc = tl.sum(acc, 0) / total
    tl.store(out + row * DV + dv, acc.to(out.dtype.element_ty), mask=dv < DV)


@triton.jit
def _select(
    maxima, row, peak, total, seen, block_idx, scores, list_at, N, K,
    KEPT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the blocks a group selects among the ``seen`` first, from its heads' rows."""
    unseen = total == 0
    log_total = tl.log(tl.where(unseen, 1.0, total))
    stop = N if scores is not None else seen
    best = tl.full([1, KEPT], NOTHING, tl.float64)
    for begin in range(0, stop, CHUNK):
        n = begin + tl.arange(0, CHUNK)
        known = (n < seen)[None, :] & ~unseen[:, None]
        top = tl.load(maxima + row[:, None] * N + n, mask=known, other=float("-inf"))
        score = tl.max(top - peak[:, None] - log_total[:, None], 0)
        if scores is not None:
            tl.store(scores + list_at * N + n, tl.exp(score), mask=n < N)
        chunk = tl.topk(ranked(score, n)[None, :], KEPT)
        if begin > 0:
            chunk = best_of(best, chunk)
        best = chunk
    if block_idx is not None:
        rank = tl.arange(0, KEPT)[None, :]
        tl.store(block_idx + list_at * K + rank, ascending(best, K), mask=rank < K)
