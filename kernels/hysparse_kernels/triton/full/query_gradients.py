"""The gradients of full attention's queries: sums over the keys that a query tile sees."""

import triton
import triton.language as tl

from hysparse_kernels.triton.full.key_gradients import NEVER, load_range, weights
from hysparse_kernels.triton.tiles import dot

STATISTICS: tl.constexpr = tl.constexpr(128)  # rows of delta and lse2 are padded to multiples


@triton.jit
def _add_keys(
    dq,
    q_tile,
    d_out_tile,
    delta,
    log_total,
    k,
    v,
    first_seen,
    last_seen,
    mask,
    stride_ms,
    b,
    g,
    begin,
    end,
    S,
    scale,
    softcap,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the keys from ``begin`` to ``end`` give to a query tile's gradient."""
    for slot in range(begin, end, KEYS):
        k_tile = k.load([b, g, slot, 0]).reshape(KEYS, PADDED_D)
        logits = dot(q_tile, k_tile.T)  # [ROWS, KEYS]
        dp = dot(d_out_tile, v.load([b, g, slot, 0]).reshape(KEYS, PADDED_DV).T)
        p, slope = weights(logits, log_total[:, None], scale, softcap)
        if MASKED:
            slots = slot + tl.arange(0, KEYS)
            seen = (slots[None, :] >= first_seen[:, None]) & (slots[None, :] <= last_seen[:, None])
            if mask is not None:
                real = tl.load(mask + slots.to(tl.int64) * stride_ms, mask=slots < S, other=0)
                seen &= (real != 0)[None, :]
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - delta[:, None]) * slope
        dq += dot(ds.to(k_tile.dtype), k_tile)
    return dq


@triton.jit(
    do_not_specialize=[
        "stride_fb", "stride_lb", "stride_mb", "B", "T", "S"
    ]
)  # fmt: skip
def sum_over_keys(
    q,
    d_out,
    k,
    v,
    dq_out,
    first,
    stride_fb,
    stride_ft,
    last,
    stride_lb,
    stride_lt,
    mask,
    stride_mb,
    stride_ms,
    delta,
    lse2,
    B,
    T,
    S,
    scale,
    softcap,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dQ of one query tile; the last queries, which see most keys, come first."""
    pid = tl.program_id(0)
    tile = tl.num_programs(0) // (B * H) - 1 - pid // (B * H)
    h = pid % H
    b = pid // H % B
    g = h // GROUP
    b_wide = b.to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < T
    t = tl.minimum(rows, T - 1).to(tl.int64)

    last += b_wide * stride_lb
    if first is not None:
        first += b_wide * stride_fb
    first_seen, last_seen = load_range(first, last, rows, stride_ft, stride_lt, T, S)
    if mask is not None:
        mask += b_wide * stride_mb
    seeing = first_seen <= last_seen
    begin = tl.min(tl.where(seeing, first_seen, NEVER), 0)
    end = tl.max(tl.where(seeing, last_seen, -1), 0) + 1
    full = 0
    if mask is None:
        common = tl.min(tl.where(inside, last_seen, NEVER), 0) + 1 - begin
        if tl.max(first_seen, 0) <= begin:
            full = tl.maximum(common, 0) // KEYS * KEYS

    q_tile = q.load([b, h, tile * ROWS, 0]).reshape(ROWS, PADDED_D)
    d_out_tile = d_out.load([b, h, tile * ROWS, 0]).reshape(ROWS, PADDED_DV)
    of_rows = (b_wide * H + h) * tl.cdiv(T, STATISTICS) * STATISTICS + t
    delta_rows, log_total = tl.load(delta + of_rows), tl.load(lse2 + of_rows)
    dq = tl.zeros([ROWS, PADDED_D], tl.float32)
    if mask is None:
        dq = _add_keys(
            dq, q_tile, d_out_tile, delta_rows, log_total, k, v, first_seen, last_seen, mask,
            stride_ms, b, g, begin, begin + full, S, scale, softcap, PADDED_D, PADDED_DV, KEYS,
            False,
        )  # fmt: skip
    dq = _add_keys(
        dq, q_tile, d_out_tile, delta_rows, log_total, k, v, first_seen, last_seen, mask,
        stride_ms, b, g, begin + full, end, S, scale, softcap, PADDED_D, PADDED_DV, KEYS, True,
    )  # fmt: skip
    d = tl.arange(0, PADDED_D)
    at = dq_out + ((b_wide * T + t) * H + h)[:, None] * D + d[None, :]
    given = inside[:, None] & (d < D)[None, :]
    tl.store(at, (dq * scale).to(dq_out.dtype.element_ty), mask=given)
