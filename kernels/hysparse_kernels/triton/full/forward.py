"""Full attention, forward: every key range, sinks and softcap; block maxima on the way.

The online softmax of FlashAttention (https://arxiv.org/abs/2205.14135) has each key tile's maxima
in its registers: they are what HySparse scores blocks by (Algorithm 1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import describe, last_contiguous, strides_of
from hysparse_kernels.triton.full.top_k import Maxima
from hysparse_kernels.triton.tiles import LN_2, LOG2_E, dot, tanh

LOWEST: tl.constexpr = tl.constexpr(-1e30)  # a finite pivot for rows that have seen no key
NEVER: tl.constexpr = tl.constexpr(2**31 - 1)


def full_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    out: Tensor,
    lse: Tensor,
    maxima: Maxima | None,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    block_size: int,
) -> None:
    """Attend each query to its key range, into ``out`` and ``lse``, and keep each block's maximum.

    Args:
        q: (B, T, H, D), a slab of queries or all. k: (B, S, G, D), H a multiple of G.
            v: (B, S, G, Dv).
        key_range: of the queries in q.
        out: (B, T, H, Dv), its last dim contiguous. lse: (B, T, H) float32. Both are written.
        maxima: written, where given; peaks and totals have the strides of lse.
        sinks: (H,) logits added to the denominator, or None.
        softcap: c in c * tanh(logits / c), or None.
        block_size: tokens in a key block, a power of two from 16 to 128; counted from each
            query's own first key.
    """
    B, T, H, D = q.shape
    S, G, Dv = v.shape[1:]
    if not lse.numel():
        return
    if not S:
        out.zero_()
        lse.copy_(sinks.expand_as(lse)) if sinks is not None else lse.fill_(-torch.inf)
        return
    if scale < 0:  # the largest logit is that of the largest product from here on
        q, scale = -q, -scale
    if scale == 0:  # -inf * 0 is NaN
        q, scale = torch.zeros_like(q), 1.0
    q = last_contiguous(q)
    first, last, mask = key_range.first, key_range.last, key_range.mask
    padded_d, padded_dv = (max(16, triton.next_power_of_2(x)) for x in (D, Dv))
    rows, keys, num_warps, num_stages = _configuration(q.dtype, padded_d + padded_dv)
    _attend[(triton.cdiv(T, rows) * H * B,)](
        q,
        *q.stride()[:3],
        describe(k, keys, padded_d),
        describe(v, keys, padded_dv),
        first,
        *strides_of(first),
        last,
        *strides_of(last),
        None if mask is None else mask.view(torch.uint8),
        *strides_of(mask),
        sinks,
        out,
        *out.stride()[:3],
        lse,
        *lse.stride(),
        *(None, None, None) if maxima is None else maxima,
        *(0, 0, 0) if maxima is None else maxima.blocks.stride()[:3],
        B,
        T,
        S,
        0 if maxima is None else maxima.blocks.shape[2],
        scale,
        softcap,
        H=H,
        GROUP=H // G,
        BLOCK=0 if maxima is None else block_size,
        D=D,
        PADDED_D=padded_d,
        DV=Dv,
        PADDED_DV=padded_dv,
        ROWS=rows,
        KEYS=keys,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _configuration(dtype: torch.dtype, dims: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps and stages, for padded head dims that add up to ``dims``."""
    if dtype == torch.float32:
        return (32, 32, 8, 1) if dims <= 256 else (16, 16, 8, 1)
    return (128, 64, 8, 3) if dims <= 256 else (128, 64, 8, 2)


@triton.jit
def _attend_tiles(
    acc,
    total,
    peak,
    top_of_block,
    q,
    k,
    v,
    mask,
    stride_ms,
    maxima,
    stride_xn,
    b,
    g,
    S,
    N,
    first,
    last,
    member,
    inside,
    origin,
    begin,
    end,
    scale,
    softcap,
    BLOCK: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The online softmax over key tiles from ``begin`` to ``end``, blocks from ``origin``.

    Logits and ``peak`` are raw: they are scaled after they are subtracted, so that the largest
    weighs exactly 1, however large.
    """
    for slot in range(begin, end, KEYS):
        logits = dot(q, k.load([b, g, slot, 0]).reshape(KEYS, PADDED_D).T)  # [ROWS, KEYS]
        factor = scale * LOG2_E
        if softcap is not None:
            logits = softcap * LOG2_E * tanh(logits * (scale / softcap))
            factor = 1.0
        if MASKED:
            slots = slot + tl.arange(0, KEYS)
            seen = (slots[None, :] <= last[:, None]) & (slots[None, :] >= first[:, None])
            seen &= member[:, None]
            if mask is not None:
                real = tl.load(mask + slots.to(tl.int64) * stride_ms, mask=slots < S, other=0)
                seen &= (real != 0)[None, :]
            logits = tl.where(seen, logits, float("-inf"))
        if maxima is not None and BLOCK < KEYS:
            tops = tl.max(tl.reshape(logits, [ROWS, KEYS // BLOCK, BLOCK]), 2)
            n = (slot - origin) // BLOCK + tl.arange(0, KEYS // BLOCK)
            at = maxima[:, None] + n.to(tl.int64)[None, :] * stride_xn
            known = (member & inside)[:, None] & (n < N)[None, :]
            tl.store(at, tops * factor * LN_2, mask=known)
            top = tl.max(tops, 1)
        else:
            top = tl.max(logits, 1)
        if maxima is not None and BLOCK >= KEYS:
            opens = (slot - origin) % BLOCK == 0
            top_of_block = tl.where(opens, top, tl.maximum(top, top_of_block))
            at = maxima + ((slot - origin) // BLOCK).to(tl.int64) * stride_xn
            tl.store(at, top_of_block * factor * LN_2, mask=member & inside)
        peak_next = tl.maximum(peak, top)
        weights = tl.exp2((logits - peak_next[:, None]) * factor)
        decay = tl.exp2((peak - peak_next) * factor)
        total = total * decay[:, None] + tl.sum(tl.reshape(weights, [ROWS, KEYS // 8, 8]), 1)
        v_tile = v.load([b, g, slot, 0]).reshape(KEYS, PADDED_DV)
        acc = acc * decay[:, None] + dot(weights.to(v_tile.dtype), v_tile)
        peak = peak_next
    return acc, total, peak, top_of_block


@triton.jit(
    do_not_specialize=[
        "stride_fb", "stride_lb", "stride_mb", "stride_eb", "stride_xb", "stride_xh", "stride_xn",
        "B", "T", "S", "N",
    ]
)  # fmt: skip
def _attend(
    q,
    stride_qb,
    stride_qt,
    stride_qh,
    k,
    v,
    first,
    stride_fb,
    stride_ft,
    last,
    stride_lb,
    stride_lt,
    mask,
    stride_mb,
    stride_ms,
    sinks,
    out,
    stride_ob,
    stride_ot,
    stride_oh,
    lse,
    stride_eb,
    stride_et,
    stride_eh,
    maxima,
    peaks,
    totals,
    stride_xb,
    stride_xh,
    stride_xn,
    B,
    T,
    S,
    N,
    scale,
    softcap,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = tl.num_programs(0) // (B * H) - 1 - pid // (B * H)  # the longest first
    h = pid % H
    b = pid // H % B
    g = h // GROUP

    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < T
    t = tl.minimum(rows, T - 1).to(tl.int64)
    b_wide, h_wide = b.to(tl.int64), h.to(tl.int64)
    d = tl.arange(0, PADDED_D)
    at = q + b_wide * stride_qb + h_wide * stride_qh + t[:, None] * stride_qt + d[None, :]
    q_tile = tl.load(at) if D == PADDED_D else tl.load(at, mask=(d < D)[None, :], other=0.0)
    last_seen = tl.load(last + b_wide * stride_lb + t * stride_lt)
    last_seen = tl.minimum(last_seen.to(tl.int32), S - 1)  # [ROWS]
    if first is None:
        first_seen = tl.zeros([ROWS], tl.int32)
    else:
        first_seen = tl.load(first + b_wide * stride_fb + t * stride_ft).to(tl.int32)
        first_seen = tl.maximum(first_seen, 0)
    if mask is not None:
        mask += b_wide * stride_mb
    if maxima is not None:
        maxima += b_wide * stride_xb + h_wide * stride_xh + t

    acc = tl.zeros([ROWS, PADDED_DV], tl.float32)
    total = tl.zeros([ROWS, 8], tl.float32)  # eight columns a row: no shuffles in the loop
    peak = tl.full([ROWS], LOWEST, tl.float32)
    top_of_block = peak
    origin = tl.min(first_seen, 0)
    one_origin = origin == tl.max(first_seen, 0)
    while origin < NEVER:
        # The blocks of rows with another first key lie elsewhere: their maxima take a turn each.
        member = first_seen >= 0 if maxima is None else first_seen == origin
        end = tl.max(tl.where(member, last_seen, -1), 0) + 1
        middle = origin
        if mask is None:
            all_see = tl.min(last_seen, 0) + 1 - origin
            middle += tl.where(one_origin, tl.maximum(all_see, 0) // KEYS * KEYS, 0)
            acc, total, peak, top_of_block = _attend_tiles(
                acc, total, peak, top_of_block, q_tile, k, v, mask, stride_ms, maxima, stride_xn,
                b, g, S, N, first_seen, last_seen, member, inside, origin, origin, middle,
                scale, softcap, BLOCK, PADDED_D, PADDED_DV, ROWS, KEYS, False,
            )  # fmt: skip
        acc, total, peak, top_of_block = _attend_tiles(
            acc, total, peak, top_of_block, q_tile, k, v, mask, stride_ms, maxima, stride_xn,
            b, g, S, N, first_seen, last_seen, member, inside, origin, middle, end,
            scale, softcap, BLOCK, PADDED_D, PADDED_DV, ROWS, KEYS, True,
        )  # fmt: skip
        if maxima is None:
            origin = NEVER
        else:
            origin = tl.min(tl.where(first_seen > origin, first_seen, NEVER), 0)

    total = tl.sum(total, 1)
    of_keys = peak * (scale * LOG2_E if softcap is None else 1.0)  # in base 2
    peak = of_keys
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        peak = tl.maximum(of_keys, sink)
        # fused into one rounding, the difference of equal large numbers may be above 0
        decay = tl.exp2(tl.minimum(of_keys - peak, 0.0))
        total = total * decay + tl.exp2(sink - peak)
        acc = acc * decay[:, None]
    at = b_wide * stride_eb + t * stride_et + h_wide * stride_eh
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    log_total = tl.log2(total)
    tl.store(lse + at, tl.where(empty, float("-inf"), (peak + log_total) * LN_2), mask=inside)
    if maxima is not None:
        tl.store(peaks + at, of_keys * LN_2, mask=inside)
        log_total = (peak - of_keys + log_total) * LN_2
        tl.store(totals + at, tl.where(empty, float("-inf"), log_total), mask=inside)
    acc = acc / total[:, None]
    d = tl.arange(0, PADDED_DV)
    at = out + b_wide * stride_ob + h_wide * stride_oh + t[:, None] * stride_ot + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < DV)[None, :])
