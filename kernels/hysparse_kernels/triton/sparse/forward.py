"""Block-sparse attention, forward: tiles of neighbouring queries over the union of their blocks.

On Hopper ``forward_hopper`` does it where it can; the kernel here does it everywhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.outputs import Attention
from hysparse_kernels.triton.arguments import describe, last_contiguous, strides_of
from hysparse_kernels.triton.hopper import TILE_ROWS
from hysparse_kernels.triton.sparse import forward_hopper as hopper
from hysparse_kernels.triton.sparse.query_tiles import query_tiles
from hysparse_kernels.triton.tiles import LN_2, LOG2_E, dot, tanh


def sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    key_range: KeyRange,
    *,
    block_size: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Attention:
    """Attend each query to its selected key blocks (HySparse eq. 6-7).

    Args:
        q: (B, T, H, D). k: (B, S, G, D), H a multiple of G. v: (B, S, G, Dv).
        block_idx: (B, T, G, K) integers, distinct in a list, -1 pads anywhere.
        block_size: tokens in a key block, a power of two from 16 to 128.
        sinks: (H,) logits added to the denominator, or None.
    Returns: Attention(out, lse), lse in float32.
    """
    B, T, H, D = q.shape
    S, G, Dv = v.shape[1:]
    out = q.new_empty(B, T, H, Dv)
    lse = q.new_empty(B, T, H, dtype=torch.float32)
    if not lse.numel() or not S:
        lse.fill_(-torch.inf) if sinks is None else lse.copy_(sinks)
        return Attention(out.zero_(), lse)
    tiles = query_tiles(block_idx, key_range, block_size=block_size, num_keys=S, group=H // G)
    if tiles.queries * (H // G) == TILE_ROWS and hopper.takes(
        q, k, v, key_range, block_size=block_size, scale=scale, softcap=softcap
    ):
        hopper.sparse_forward(
            q, k, v, tiles, key_range, out, lse, block_size=block_size, scale=scale, sinks=sinks
        )
        return Attention(out, lse)
    mask = key_range.mask
    padded_d, padded_dv = triton.next_power_of_2(D), triton.next_power_of_2(Dv)
    keys, num_warps, num_stages = configuration(q.dtype, block_size, padded_d + padded_dv)
    split = split_of(tiles.queries, H // G, q.dtype)
    q = last_contiguous(q)
    _attend[(B * G * tiles.counts.shape[2] * split,)](
        q,
        *q.stride()[:3],
        describe(k, keys, padded_d),
        describe(v, keys, padded_dv),
        out,
        lse,
        key_range.last,
        *strides_of(key_range.last),
        mask,
        *strides_of(mask),
        sinks,
        tiles.starts,
        tiles.members,
        tiles.counts,
        scale,
        softcap,
        T,
        S,
        G,
        CAPACITY=tiles.starts.shape[3],
        QUERIES=tiles.queries,
        SPLIT=split,
        GROUP=H // G,
        HEADS=max(triton.next_power_of_2(H // G), 16 * split // tiles.queries),
        BLOCK=block_size,
        KEYS=keys,
        D=D,
        DV=Dv,
        PADDED_D=padded_d,
        PADDED_DV=padded_dv,
        STAGES=num_stages,
        num_warps=num_warps,
    )
    return Attention(out, lse)


def split_of(queries: int, group: int, dtype: torch.dtype) -> int:
    """Into how many programs a tile goes, a power of two, so that shared memory holds its rows."""
    if dtype != torch.float32:
        return 1
    rows: int = queries * triton.next_power_of_2(group)
    return min(queries, max(1, rows // 32))


def configuration(dtype: torch.dtype, block_size: int, width: int) -> tuple[int, int, int]:
    """Keys of a step, warps, and pipeline stages, for D + Dv padded: what shared memory holds."""
    if dtype == torch.float32:
        return min(block_size, 32), 8, 1
    return min(block_size, 64), 8, 3 if width <= 256 else 2


@triton.jit
def logits_of(product, scale, softcap):
    """Logits in base 2 of q . k."""
    logits = product * scale
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    return logits * LOG2_E


@triton.jit
def real_keys(mask, stride_ms, slots, S):
    """Which slots hold a real token."""
    at = slots.to(tl.int64) * stride_ms
    return tl.load(mask + at, mask=slots < S, other=0) != 0


@triton.jit(do_not_specialize=["T", "S", "stride_lb", "stride_mb", "scale", "softcap"])
def _attend(
    q,
    stride_qb,
    stride_qt,
    stride_qh,
    k_desc,
    v_desc,
    out,
    lse,
    last,
    stride_lb,
    stride_lt,
    mask,
    stride_mb,
    stride_ms,
    sinks,
    starts,
    members,
    counts,
    scale,
    softcap,
    T,
    S,
    G,
    CAPACITY: tl.constexpr,
    QUERIES: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = QUERIES // SPLIT * HEADS
    PARTS: tl.constexpr = BLOCK // KEYS
    pid, part = tl.program_id(0).to(tl.int64) // SPLIT, tl.program_id(0) % SPLIT
    tiles = tl.cdiv(T, QUERIES)
    tile, g, b = pid % tiles, pid // tiles % G, pid // tiles // G

    row = tl.arange(0, ROWS)
    query, head = part * (QUERIES // SPLIT) + row // HEADS, row % HEADS
    t = tile * QUERIES + query
    real = (t < T) & (head < GROUP)
    d, dv, key = tl.arange(0, PADDED_D), tl.arange(0, PADDED_DV), tl.arange(0, KEYS)
    h = g * GROUP + head

    # The pivot is finite, so that a row without keys makes no NaN.
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DV], tl.float32)

    q_at = b * stride_qb + t * stride_qt + h * stride_qh
    q_tile = tl.load(q + q_at[:, None] + d, mask=real[:, None] & (d < D), other=0.0)
    end = tl.load(last + b * stride_lb + t * stride_lt, mask=real, other=-1)
    end = tl.minimum(end, S - 1).to(tl.int32)
    starts += pid * CAPACITY
    members += pid * CAPACITY
    count = tl.load(counts + pid)
    start = tl.load(starts, mask=count > 0, other=0)
    for i in tl.range(0, count * PARTS, num_stages=STAGES):
        slot = start + i % PARTS * KEYS
        k_tile = k_desc.load([b.to(tl.int32), g.to(tl.int32), slot, 0]).reshape(KEYS, PADDED_D)
        v_tile = v_desc.load([b.to(tl.int32), g.to(tl.int32), slot, 0]).reshape(KEYS, PADDED_DV)
        chosen_by = tl.load(members + i // PARTS)
        following = (i + 1) // PARTS
        start = tl.load(starts + following, mask=following < count, other=0)

        logits = logits_of(dot(q_tile, k_tile.T), scale, softcap)
        limit = tl.where((chosen_by >> query) & 1 != 0, end, -1)
        seen = (slot + key)[None, :] <= limit[:, None]
        if mask is not None:
            seen &= real_keys(mask + b * stride_mb, stride_ms, slot + key, S)[None, :]
        logits = tl.where(seen, logits, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc += dot(weights.to(v_tile.dtype), v_tile)
        peak = new_peak

    unseen = total == 0
    if sinks is not None:
        sink = tl.load(sinks + h, mask=real, other=0.0).to(tl.float32) * LOG2_E
        new_peak = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.exp2(sink - new_peak)
        acc *= shrink[:, None]
        peak = new_peak
        unseen = total == 0
    total = tl.where(unseen, 1.0, total)
    log_total = tl.where(unseen, float("-inf"), (peak + tl.log2(total)) * LN_2)
    at = (b * T + t) * (G * GROUP) + h
    tl.store(lse + at, log_total, mask=real)
    tl.store(
        out + at[:, None] * DV + dv,
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=real[:, None] & (dv < DV),
    )
