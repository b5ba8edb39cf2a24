"""TopK of key blocks from raw block maxima: normalise, take the group's maximum, keep the best.

Each lane owns a query and sorts its candidates in registers, ``K`` at a time, into a running list.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import strides_of

# A key is a double, since doubles are compared beside the units that select: its high half is the
# score, its low half the block, which decides between equal scores. No finite score makes a NaN.
NOTHING: tl.constexpr = tl.constexpr(float("-inf"))
LAST_BLOCK: tl.constexpr = tl.constexpr(2**31 - 1)
QUERIES = 32
WARPS_WANTED = 8 * 132  # that hide the memory's latency on a large GPU


class Maxima(NamedTuple):
    """What blocks are scored by. All logits are natural, scaled and capped.

    blocks: (B, H, N, T) float32, contiguous in T: the largest logit of each query in each key
        block, -inf where it sees none of the block; unwritten beyond a query's last key.
    peaks: (B, T, H) float32, the largest logit of all, bit for bit one of ``blocks``.
    totals: (B, T, H) float32, the log of the softmax's denominator, sink included, less the peak:
        apart from it, since at logits of 1e4 their sum is known to 1e-3 only; -inf where a row
        sees nothing.
    """

    blocks: Tensor
    peaks: Tensor
    totals: Tensor

    def slab(self, begin: int, end: int, blocks: Tensor) -> "Maxima":
        """Of the queries ``begin`` to ``end``, whose ``blocks`` are given."""
        return Maxima(blocks, self.peaks[:, begin:end], self.totals[:, begin:end])


def select(
    maxima: Maxima,
    key_range: KeyRange,
    block_idx: Tensor,
    scores: Tensor | None,
    *,
    block_size: int,
) -> None:
    """Select the key blocks of each query and group (HySparse eq. 3).

        S_t^n = max over the group's heads of exp(block_t^n - peak_t - total_t)

    Args:
        maxima: blocks are read only where n <= (last - first) // block_size.
        block_idx: (B, T, G, K) int32, written: the blocks with the largest scores, ascending, -1
            pads at the end; ties go to the earlier block, and a score of 0 is never selected.
        scores: (B, T, G, N) float32, written with S, 0 where unseen; or None.
    """
    blocks, peaks, totals = maxima
    B, H, N, T = blocks.shape
    G, K = block_idx.shape[2:]
    if not B * T * G:
        return
    kept = max(16, triton.next_power_of_2(K))
    parts = 1
    programs = B * G * triton.cdiv(T, QUERIES)
    while parts < 8 and programs * parts < WARPS_WANTED and 16 * parts * kept <= N:
        parts *= 2
    first, last = key_range.first, key_range.last
    _select[(programs,)](
        blocks,
        *blocks.stride()[:3],
        peaks,
        totals,
        *totals.stride(),
        first,
        *strides_of(first),
        last,
        *strides_of(last),
        block_idx,
        *block_idx.stride(),
        scores,
        *(scores.stride() if scores is not None else (0, 0, 0, 0)),
        T,
        N,
        G,
        K,
        GROUP=H // G,
        BLOCK=block_size,
        QUERIES=QUERIES,
        PARTS=parts,
        KEPT=kept,
        WIDE=max(N * blocks.stride(2), H // G * blocks.stride(1)) >= 1 << 31,
        num_warps=parts,
    )


@triton.jit
def ranked(score, block):
    """float64 keys that order as the scores do, then earlier blocks first; NOTHING where -inf."""
    high = (score + 0.0).to(tl.int32, bitcast=True)
    low = block ^ (LAST_BLOCK & ~(high >> 31))
    key = ((high.to(tl.int64) << 32) | low.to(tl.int64)).to(tl.float64, bitcast=True)
    return tl.where(score > float("-inf"), key, NOTHING)


@triton.jit
def block_of(key):
    """The block of a key; LAST_BLOCK, beyond all blocks, of NOTHING."""
    bits = key.to(tl.int64, bitcast=True)
    low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
    return tl.where(key == NOTHING, LAST_BLOCK, low ^ (LAST_BLOCK & ~(high >> 31)))


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def _exchange(x, SPAN: tl.constexpr, RUN: tl.constexpr, UP: tl.constexpr):
    """Order what is ``SPAN`` apart; runs of ``RUN`` go up and down in turn, the first as ``UP``."""
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // (2 * SPAN)
    a, b = tl.split(tl.permute(tl.reshape(x, [ROWS, PAIRS, 2, SPAN]), [0, 1, 3, 2]))
    run = tl.arange(0, PAIRS)[None, :, None] // (RUN // (2 * SPAN))
    swap = (a < b) != ((run + UP) % 2 != 0)
    pairs = tl.join(tl.where(swap, b, a), tl.where(swap, a, b))
    return tl.reshape(tl.permute(pairs, [0, 1, 3, 2]), [ROWS, PAIRS * 2 * SPAN])


@triton.jit
def best_of(best, keys):
    """The best of ``best`` (rows, K), descending, and ``keys`` (rows, K), as ``best`` is."""
    KEPT: tl.constexpr = best.shape[1]
    # Bitonic sorting network. Against a list the other way, the larger ones are bitonic.
    for run in tl.static_range(1, _log2(KEPT) + 1):
        for i in tl.static_range(run):
            keys = _exchange(keys, 1 << (run - 1 - i), 1 << run, 1)
    best = tl.where(best < keys, keys, best)
    for i in tl.static_range(_log2(KEPT)):
        best = _exchange(best, KEPT >> (i + 1), KEPT, 0)
    return best


@triton.jit
def ascending(best, K):
    """The blocks of ``best``'s first ``K`` keys (rows, at least K), ascending, -1 at the end."""
    rank = tl.arange(0, best.shape[1])[None, :]
    block = tl.sort(tl.where(rank < K, block_of(best), LAST_BLOCK))
    return tl.where(block == LAST_BLOCK, -1, block)


@triton.jit(
    do_not_specialize=[
        "stride_mb", "stride_mh", "stride_mn", "stride_sb", "stride_ib",
        "stride_it", "stride_ob", "stride_ot", "stride_og", "stride_fb", "stride_lb", "T", "N", "K",
    ]
)  # fmt: skip
def _select(
    maxima,
    stride_mb,
    stride_mh,
    stride_mn,
    peaks,
    totals,
    stride_sb,
    stride_st,
    stride_sh,
    first,
    stride_fb,
    stride_ft,
    last,
    stride_lb,
    stride_lt,
    block_idx,
    stride_ib,
    stride_it,
    stride_ig,
    stride_ik,
    scores,
    stride_ob,
    stride_ot,
    stride_og,
    stride_on,
    T,
    N,
    G,
    K,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
    KEPT: tl.constexpr,
    WIDE: tl.constexpr,
):
    ROWS: tl.constexpr = QUERIES * PARTS
    UNROLLED: tl.constexpr = 4 if GROUP % 4 == 0 else GROUP  # heads whose loads are in flight
    pid = tl.program_id(0).to(tl.int64)
    # The longest rows first.
    pairs = tl.num_programs(0) // tl.cdiv(T, QUERIES)
    tile, g, b = tl.cdiv(T, QUERIES) - 1 - pid // pairs, pid % pairs % G, pid % pairs // G

    # A row is a query and the part of its blocks that it goes through.
    row = tl.arange(0, ROWS)
    t = tile * QUERIES + row % QUERIES
    real = t < T
    end = tl.load(last + b * stride_lb + t * stride_lt, mask=real, other=-1)
    start = tl.zeros([ROWS], tl.int64)
    if first is not None:
        own = tl.load(first + b * stride_fb + t * stride_ft, mask=real, other=0)
        start = tl.maximum(start, own)
    of_rows = b * stride_sb + t * stride_st + g * GROUP * stride_sh
    peaks += of_rows
    totals += of_rows
    sees = (end >= start) & (tl.load(totals, mask=real, other=float("-inf")) > float("-inf"))
    seen = tl.minimum(tl.where(sees, (end - start) // BLOCK + 1, 0), N).to(tl.int32)
    stop = N if scores is not None else tl.max(seen)

    best = tl.full([ROWS, KEPT], NOTHING, tl.float64)
    part = row // QUERIES * KEPT
    maxima += b * stride_mb + g * GROUP * stride_mh + tile * QUERIES
    if WIDE:
        stride_mh, stride_mn = tl.cast(stride_mh, tl.int64), tl.cast(stride_mn, tl.int64)
    for begin in range(0, stop, PARTS * KEPT):
        n = begin + part[:, None] + tl.arange(0, KEPT)[None, :]
        visible = n < seen[:, None]
        at = n * stride_mn + (row % QUERIES)[:, None]
        score = tl.full([ROWS, KEPT], float("-inf"), tl.float32)
        for heads in range(0, GROUP, UNROLLED):
            for i in tl.static_range(UNROLLED):
                r = heads + i
                peak = tl.load(peaks + r * stride_sh, mask=sees, other=0.0)
                total = tl.load(totals + r * stride_sh, mask=sees, other=0.0)
                top = tl.load(maxima + r * stride_mh + at, mask=visible, other=float("-inf"))
                score = tl.maximum(score, top - peak[:, None] - total[:, None])
        if scores is not None:
            to = scores + b * stride_ob + t[:, None] * stride_ot + g * stride_og + n * stride_on
            tl.store(to, tl.exp(score), mask=real[:, None] & (n < N))
        best = best_of(best, ranked(score, n))

    if PARTS > 1:
        best = tl.permute(tl.reshape(best, [PARTS, QUERIES, KEPT]), [1, 0, 2])
        best = tl.topk(tl.reshape(best, [QUERIES, PARTS * KEPT]), KEPT)
    t = tile * QUERIES + tl.arange(0, QUERIES)
    rank = tl.arange(0, KEPT)
    to = block_idx + b * stride_ib + t[:, None] * stride_it + g * stride_ig + rank * stride_ik
    tl.store(to, ascending(best, K), mask=(t < T)[:, None] & (rank < K)[None, :])
