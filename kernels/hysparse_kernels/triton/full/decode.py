"""Full attention of few queries, with the TopK of blocks: keys split over the GPU, then merged.

As in Flash-Decoding (https://pytorch.org/blog/flash-decoding): each program attends to one part of
the keys of a KV head, all queries and heads of the group at once; a second launch merges the parts
and selects blocks, since a block's score needs the whole row's denominator.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import last_contiguous, strides_of
from hysparse_kernels.triton.full.decode_merge import merge_splits
from hysparse_kernels.triton.tiles import LOG2_E, dot, tanh

SPLIT_KEYS = 512  # at least
PROGRAMS_PER_SM = 3  # that run at a time
MOST_WAVES = 4


def full_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    block_size: int | None,
    top_k_blocks: int,
    return_block_scores: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Attend few queries to all keys and select the best key blocks (HySparse eq. 1-3).

    Keys beyond a sequence's last query are not read, so ``k`` may be a cache longer than that.

    Args:
        q: (B, T, H, D) with T * H / G at most ``DECODE_ROWS``. k: (B, S, G, D). v: (B, S, G, Dv).
        sinks: (H,) logits added to the denominator, or None.
        block_size: tokens in a key block, a power of two from 16 to 128; or None without selection.
    Returns: out (B, T, H, Dv), lse (B, T, H) float32, block_idx (B, T, G, K) int32 or None,
        block_scores (B, T, G, N) float32 or None.
    """
    B, T, H, D = q.shape
    S, G, Dv = v.shape[1:]
    group, num_blocks = H // G, -(-S // (block_size or 1))
    out = q.new_empty(B, T, H, Dv)
    lse = q.new_empty(B, T, H, dtype=torch.float32)
    block_idx = q.new_empty(B, T, G, top_k_blocks, dtype=torch.int32) if top_k_blocks else None
    scores = None
    if return_block_scores:
        scores = q.new_empty(B, T, G, num_blocks, dtype=torch.float32)
    if not lse.numel():
        return out, lse, block_idx, scores
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    first, last, mask = key_range.first, key_range.last, key_range.mask
    selects = block_idx is not None or scores is not None
    keys, num_warps, num_stages = _configuration(q, Dv)
    splits = _num_splits(B * G, S, q.device)
    partial_out = q.new_empty(splits, B, T, H, Dv, dtype=torch.float32)
    partial_sum = q.new_empty(2, splits, B, T, H, dtype=torch.float32)
    maxima = q.new_empty(B, T, H, num_blocks, dtype=torch.float32) if selects else None
    padded_d, padded_dv = triton.next_power_of_2(D), triton.next_power_of_2(Dv)
    _attend[(splits * B * G,)](
        q,
        *q.stride()[:3],
        k,
        *k.stride()[:3],
        v,
        *v.stride()[:3],
        first,
        last,
        *strides_of(first),
        *strides_of(last),
        mask,
        *strides_of(mask),
        partial_out,
        partial_sum,
        maxima,
        scale,
        softcap,
        B,
        T,
        S,
        G,
        num_blocks,
        splits,
        ROWS=max(16, triton.next_power_of_2(T * group)),
        GROUP=group,
        BLOCK=block_size or keys,
        KEYS=keys,
        D=D,
        DV=Dv,
        PADDED_D=padded_d,
        PADDED_DV=padded_dv,
        STAGES=num_stages,
        num_warps=num_warps,
    )
    merge_splits(
        partial_out, partial_sum, maxima, sinks, key_range, out, lse, block_idx, scores,
        block_size=block_size,
    )  # fmt: skip
    return out, lse, block_idx, scores


def _num_splits(pairs: int, num_keys: int, device: torch.device) -> int:
    """Parts of the keys, from shapes alone: programs that fill the GPU a whole number of times."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    slots = PROGRAMS_PER_SM * processors
    most = min(num_keys // SPLIT_KEYS, MOST_WAVES * slots // pairs)

    def fill(splits: int) -> float:
        return splits * pairs / (-(-splits * pairs // slots) * slots)

    return max(range(1, max(1, most) + 1), key=lambda splits: (fill(splits), splits))


def _configuration(q: Tensor, v_dim: int) -> tuple[int, int, int]:
    """Keys of a tile, warps, pipeline stages."""
    if q.dtype == torch.float32:
        return 16, 4, 1
    return (64, 4, 3) if q.shape[3] + v_dim <= 256 else (32, 4, 3)


@triton.jit
def attend_tile(q_tile, k_tile, v_tile, seen, peak, total, acc, scale, softcap):
    """One step of the online softmax. Also returns the logits, -inf where unseen.

    Logits are multiplied by LOG2_E after they are subtracted, so that the largest weighs exactly 1.
    q_tile (rows, D), k_tile (keys, D), v_tile (keys, Dv), seen (rows or 1, keys); peak (rows,) is
    finite, total (rows,), acc (rows, Dv).
    """
    logits = dot(q_tile, k_tile.T) * scale
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    logits = tl.where(seen, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2((logits - new_peak[:, None]) * LOG2_E)
    shrink = tl.exp2((peak - new_peak) * LOG2_E)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + dot(weights.to(v_tile.dtype), v_tile)
    return logits, new_peak, total, acc


@triton.jit(
    do_not_specialize=[
        "stride_fb", "stride_lb", "stride_mb", "scale", "softcap", "B", "T", "S", "G", "N",
        "splits",
    ]
)  # fmt: skip
def _attend(
    q, stride_qb, stride_qt, stride_qh,
    k, stride_kb, stride_ks, stride_kg,
    v, stride_vb, stride_vs, stride_vg,
    first, last, stride_fb, stride_ft, stride_lb, stride_lt,
    mask, stride_mb, stride_ms,
    partial_out, partial_sum, maxima, scale, softcap, B, T, S, G, N, splits,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = max(KEYS, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    split, g, b = pid % splits, pid // splits % G, pid // splits // G

    row = tl.arange(0, ROWS)
    t, h = row // GROUP, g * GROUP + row % GROUP
    real = t < T
    d, dv, key = tl.arange(0, PADDED_D), tl.arange(0, PADDED_DV), tl.arange(0, KEYS)
    q_at = b * stride_qb + t.to(tl.int64) * stride_qt + h * stride_qh
    q_tile = tl.load(q + q_at[:, None] + d, mask=real[:, None] & (d < D), other=0.0)
    end = tl.load(last + b * stride_lb + t * stride_lt, mask=real, other=-1)
    end = tl.minimum(end, S - 1).to(tl.int32)
    start = tl.zeros([ROWS], tl.int32)
    if first is not None:
        start = tl.load(first + b * stride_fb + t * stride_ft, mask=real, other=0).to(tl.int32)
        start = tl.maximum(start, 0)
    start = tl.where(end >= start, start, S)
    k += b * stride_kb + g * stride_kg
    v += b * stride_vb + g * stride_vg

    # The pivot is finite, so that a row without keys makes no NaN.
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DV], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)  # of the block so far
    begin = tl.min(start)
    while begin < S:  # once for all the rows whose blocks count from the same slot
        stop = tl.max(tl.where(start == begin, end, -1))
        limit = tl.where(start == begin, end, -1)
        # Whole blocks to each split, so that each block's maximum is one program's.
        units = (stop - begin) // UNIT + 1
        low = (units * split // splits).to(tl.int32) * (UNIT // KEYS)
        high = (units * (split + 1) // splits).to(tl.int32) * (UNIT // KEYS)
        high = tl.minimum(high, (stop - begin) // KEYS + 1)
        for i in tl.range(low, high, num_stages=STAGES):
            slot = begin + i * KEYS + key
            inside = slot <= stop
            if mask is not None:
                at = b * stride_mb + slot.to(tl.int64) * stride_ms
                inside &= tl.load(mask + at, mask=inside, other=0) != 0
            at = slot.to(tl.int64)[:, None]
            k_tile = tl.load(k + at * stride_ks + d, mask=inside[:, None] & (d < D), other=0.0)
            v_tile = tl.load(v + at * stride_vs + dv, mask=inside[:, None] & (dv < DV), other=0.0)
            seen = inside[None, :] & (slot[None, :] <= limit[:, None])
            logits, peak, total, acc = attend_tile(
                q_tile, k_tile, v_tile, seen, peak, total, acc, scale, softcap
            )
            if maxima is not None:
                at = (b * T + t) * (G * GROUP) + h
                known = real & (start == begin)
                if KEYS < BLOCK:
                    PARTS: tl.constexpr = BLOCK // KEYS
                    top = tl.where(i % PARTS == 0, float("-inf"), top)
                    top = tl.maximum(top, tl.max(logits, 1))
                    tl.store(maxima + at * N + i // PARTS, top, mask=known)
                else:
                    BLOCKS: tl.constexpr = KEYS // BLOCK
                    tops = tl.max(tl.reshape(logits, [ROWS, BLOCKS, BLOCK]), 2)
                    n = i * BLOCKS + tl.arange(0, BLOCKS)
                    at = maxima + at[:, None] * N + n
                    tl.store(at, tops, mask=known[:, None] & (n < N))
        begin = tl.min(tl.where(start > begin, start, S))

    at = ((split * B + b) * T + t) * (G * GROUP) + h
    rows = B.to(tl.int64) * T * (G * GROUP)
    tl.store(partial_sum + at, peak, mask=real)
    tl.store(partial_sum + splits * rows + at, total, mask=real)
    tl.store(partial_out + at[:, None] * DV + dv, acc, mask=real[:, None] & (dv < DV))
