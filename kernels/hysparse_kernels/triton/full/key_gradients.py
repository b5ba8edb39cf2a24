"""The gradients of full attention's keys and values: sums over the queries that see a key tile."""

import triton
import triton.language as tl

from hysparse_kernels.triton.tiles import LOG2_E, dot, tanh

NEVER: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def load_range(first, last, t, stride_ft, stride_lt, T, S):
    """The first and last slot that queries ``t`` see, of one row of the batch; none beyond T."""
    last_seen = tl.load(last + t.to(tl.int64) * stride_lt, mask=t < T, other=-1)
    last_seen = tl.minimum(last_seen, S - 1).to(tl.int32)
    first_seen = tl.zeros_like(last_seen)
    if first is not None:
        first_seen = tl.load(first + t.to(tl.int64) * stride_ft, mask=t < T, other=0).to(tl.int32)
        first_seen = tl.maximum(first_seen, 0)
    return first_seen, last_seen


@triton.jit(do_not_specialize=["stride_fb", "stride_lb", "window", "B", "T", "S"])
def find_queries(
    first,
    stride_fb,
    stride_ft,
    last,
    stride_lb,
    stride_lt,
    bounds,
    window,
    B,
    T,
    S,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For each key tile the query tiles that see some of it, and among them those that see it all.

    window: how many slots a query sees, up to its last; None for all from its first on.
    bounds: (B, tiles, 4): from, from which on all of it, to which, to.
    """
    pid = tl.program_id(0)
    tile, b = pid // B, (pid % B).to(tl.int64)
    begin = tile * KEYS
    end = tl.minimum(begin + KEYS, S) - 1
    last += b * stride_lb
    if first is not None:
        first += b * stride_fb
    TILES: tl.constexpr = CHUNK // ROWS
    n = tl.arange(0, TILES)
    lo = tl.full([TILES], NEVER, tl.int32)
    hi = tl.zeros([TILES], tl.int32)
    full_lo, full_hi, num_full = lo, hi, hi
    for chunk in range(0, tl.cdiv(T, CHUNK)):
        t = chunk * CHUNK + tl.arange(0, CHUNK)
        first_seen, last_seen = load_range(first, last, t, stride_ft, stride_lt, T, S)
        if window is not None:
            end_seen = tl.load(last + t.to(tl.int64) * stride_lt, mask=t < T, other=-1)
            first_seen = tl.maximum(first_seen, (end_seen + 1 - window).to(tl.int32))
        some = (tl.maximum(first_seen, begin) <= tl.minimum(last_seen, end)).to(tl.int32)
        full = ((first_seen <= begin) & (last_seen >= end) | (t >= T)).to(tl.int32)
        i = chunk * TILES + n
        inside = i * ROWS < T
        some = (tl.max(tl.reshape(some, [TILES, ROWS]), 1) > 0) & inside
        full = (tl.min(tl.reshape(full, [TILES, ROWS]), 1) > 0) & inside
        lo = tl.where(some, tl.minimum(lo, i), lo)
        hi = tl.where(some, i + 1, hi)
        full_lo = tl.where(full, tl.minimum(full_lo, i), full_lo)
        full_hi = tl.where(full, i + 1, full_hi)
        num_full += full.to(tl.int32)
    stop = tl.max(hi, 0)
    start = tl.minimum(tl.min(lo, 0), stop)
    full_start, full_stop = tl.min(full_lo, 0), tl.max(full_hi, 0)
    together = tl.sum(num_full, 0) == full_stop - full_start
    at = bounds + (b * tl.cdiv(S, KEYS) + tile) * 4
    tl.store(at, start)
    tl.store(at + 1, tl.where(together, full_start, stop))
    tl.store(at + 2, tl.where(together, full_stop, stop))
    tl.store(at + 3, stop)


@triton.jit
def weights(logits, log_total, scale, softcap):
    """Softmax weights, and what the capping multiplies gradients by."""
    slope = 1.0
    factor = scale * LOG2_E
    if softcap is not None:
        logits = tanh(logits * (scale / softcap))
        slope = 1.0 - logits * logits
        factor = softcap * LOG2_E
    return tl.exp2(logits * factor - log_total), slope


@triton.jit
def _add_queries(
    dk,
    dv,
    k_tile,
    v_tile,
    q,
    d_out,
    delta,
    lse2,
    first,
    stride_ft,
    last,
    stride_lt,
    real,
    b,
    h,
    begin_key,
    begin,
    end,
    T,
    S,
    scale,
    softcap,
    H: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what query tiles ``begin`` to ``end`` of head ``h`` give to a key tile's gradients."""
    for i in range(begin, end):
        row = i * ROWS
        rows = row + tl.arange(0, ROWS)
        q_tile = q.load([b, h, row, 0]).reshape(ROWS, PADDED_D)
        log_total = lse2.load([b * H + h, row]).reshape(ROWS)
        logits = dot(k_tile, q_tile.T)  # [KEYS, ROWS]
        p, slope = weights(logits, log_total[None, :], scale, softcap)
        if MASKED:
            first_seen, last_seen = load_range(first, last, rows, stride_ft, stride_lt, T, S)
            slots = begin_key + tl.arange(0, KEYS)
            seen = (slots[:, None] >= first_seen[None, :]) & (slots[:, None] <= last_seen[None, :])
            p = tl.where(seen & real[:, None], p, 0.0)
        d_out_tile = d_out.load([b, h, row, 0]).reshape(ROWS, PADDED_DV)
        dv += dot(p.to(d_out_tile.dtype), d_out_tile)
        dp = dot(v_tile, d_out_tile.T)
        ds = p * (dp - delta.load([b * H + h, row]).reshape(ROWS)[None, :]) * slope
        if MASKED:  # a slot before a document's first may hold NaN
            ds = tl.where(p != 0, ds, 0.0)
        dk += dot(ds.to(q_tile.dtype), q_tile)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "stride_fb", "stride_lb", "stride_mb", "B", "T", "S"
    ]
)  # fmt: skip
def sum_over_queries(
    q,
    d_out,
    k,
    v,
    dk_out,
    dv_out,
    bounds,
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
    """dK and dV of one key tile; the first keys, which most queries see, come first."""
    G: tl.constexpr = H // GROUP
    pid = tl.program_id(0)
    tile = pid // (B * G)
    g = pid % G
    b = pid // G % B
    b_wide = b.to(tl.int64)
    begin_key = tile * KEYS
    slots = begin_key + tl.arange(0, KEYS)
    inside = slots < S

    last += b_wide * stride_lb
    if first is not None:
        first += b_wide * stride_fb
    real = inside
    if mask is not None:
        at = mask + b_wide * stride_mb + slots.to(tl.int64) * stride_ms
        real = tl.load(at, mask=inside, other=0) != 0
    at = bounds + (b_wide * tl.cdiv(S, KEYS) + tile) * 4
    start, full_start = tl.load(at), tl.load(at + 1)
    full_stop, stop = tl.load(at + 2), tl.load(at + 3)

    k_tile = k.load([b, g, begin_key, 0]).reshape(KEYS, PADDED_D)
    v_tile = v.load([b, g, begin_key, 0]).reshape(KEYS, PADDED_DV)
    dk = tl.zeros([KEYS, PADDED_D], tl.float32)
    dv = tl.zeros([KEYS, PADDED_DV], tl.float32)
    for r in range(GROUP):
        h = g * GROUP + r
        if mask is not None:
            full_start = stop
        dk, dv = _add_queries(
            dk, dv, k_tile, v_tile, q, d_out, delta, lse2, first, stride_ft,
            last, stride_lt, real, b, h, begin_key, start, full_start, T, S, scale, softcap,
            H, PADDED_D, PADDED_DV, ROWS, KEYS, True,
        )  # fmt: skip
        if mask is None:
            dk, dv = _add_queries(
                dk, dv, k_tile, v_tile, q, d_out, delta, lse2, first, stride_ft,
                last, stride_lt, real, b, h, begin_key, full_start, full_stop, T, S, scale, softcap,
                H, PADDED_D, PADDED_DV, ROWS, KEYS, False,
            )  # fmt: skip
            dk, dv = _add_queries(
                dk, dv, k_tile, v_tile, q, d_out, delta, lse2, first, stride_ft,
                last, stride_lt, real, b, h, begin_key, full_stop, stop, T, S, scale, softcap,
                H, PADDED_D, PADDED_DV, ROWS, KEYS, True,
            )  # fmt: skip

    row = (b_wide * S + slots) * G + g
    d = tl.arange(0, PADDED_D)
    at = dk_out + row[:, None] * D + d[None, :]
    tl.store(at, (dk * scale).to(dk_out.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    d = tl.arange(0, PADDED_DV)
    at = dv_out + row[:, None] * DV + d[None, :]
    tl.store(at, dv.to(dv_out.dtype.element_ty), mask=inside[:, None] & (d < DV)[None, :])
