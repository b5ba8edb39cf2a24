"""dK and dV of block-sparse attention: by key block, over exactly the queries that chose it."""

import triton
import triton.language as tl

from hysparse_kernels.triton.sparse.forward import logits_of, real_keys
from hysparse_kernels.triton.tiles import LOG2_E, dot


@triton.jit
def rows_of(lse, delta, gate, last, at, last_at, S, real):
    """Of each row: log of its softmax's denominator, base 2, delta, gate and last key.

    Rows that are not real, or see nothing, get a denominator so large that weights are 0.
    """
    log_total = tl.load(lse + at, mask=real, other=float("-inf")) * LOG2_E
    log_total = tl.where(log_total == float("-inf"), float("inf"), log_total)
    row_delta = tl.load(delta + at, mask=real, other=0.0)
    row_gate = 1.0
    if gate is not None:
        row_gate = tl.load(gate + at, mask=real, other=0.0)
    end = tl.minimum(tl.load(last + last_at, mask=real, other=-1), S - 1).to(tl.int32)
    return log_total, row_delta, row_gate, end


@triton.jit
def slope(logits, softcap):
    """d logits / d (scale * q . k), from the logits in base 2."""
    slope = 1.0
    if softcap is not None:
        ratio = logits / (softcap * LOG2_E)
        slope = 1 - ratio * ratio
    return slope


@triton.jit(
    do_not_specialize=["T", "S", "stride_lb", "stride_mb", "scale", "softcap", "num_lists", "bins"]
)
def differentiate_keys(
    q,
    stride_qb,
    stride_qt,
    stride_qh,
    k_desc,
    v_desc,
    d_out,
    stride_ob,
    stride_ot,
    stride_oh,
    lse,
    delta,
    gate,
    last,
    stride_lb,
    stride_lt,
    mask,
    stride_mb,
    stride_ms,
    dk,
    dv,
    queries,
    ends,
    item_ends,
    item_bins,
    item_begins,
    scale,
    softcap,
    T,
    S,
    G,
    num_lists,
    bins,
    SLOTS_PER_BIN: tl.constexpr,
    QUERIES: tl.constexpr,
    ITEM: tl.constexpr,
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
    ROWS: tl.constexpr = QUERIES * HEADS
    PARTS: tl.constexpr = BLOCK // KEYS
    item, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    if item >= tl.load(item_ends + num_lists.to(tl.int64) * bins - 1):
        return
    bin = tl.load(item_bins + item).to(tl.int64)
    begin = tl.load(item_begins + item)
    count = tl.minimum(tl.load(ends + bin) - begin, ITEM).to(tl.int32)
    slot = (bin % bins).to(tl.int32) * SLOTS_PER_BIN + part * KEYS
    g, b = bin // bins % G, bin // bins // G

    row = tl.arange(0, ROWS)
    query, head = row // HEADS, row % HEADS
    h = g * GROUP + head
    d, d_v, key = tl.arange(0, PADDED_D), tl.arange(0, PADDED_DV), tl.arange(0, KEYS)
    k_tile = k_desc.load([b.to(tl.int32), g.to(tl.int32), slot, 0]).reshape(KEYS, PADDED_D)
    v_tile = v_desc.load([b.to(tl.int32), g.to(tl.int32), slot, 0]).reshape(KEYS, PADDED_DV)
    real_key = slot + key < S
    if mask is not None:
        real_key &= real_keys(mask + b * stride_mb, stride_ms, slot + key, S)
    dk_tile = tl.zeros([KEYS, PADDED_D], tl.float32)
    dv_tile = tl.zeros([KEYS, PADDED_DV], tl.float32)
    for i in tl.range(0, count, QUERIES, num_stages=STAGES):
        real = (i + query < count) & (head < GROUP)
        t = tl.load(queries + begin + i + query, mask=real, other=0).to(tl.int64)
        q_at = b * stride_qb + t * stride_qt + h * stride_qh
        o_at = b * stride_ob + t * stride_ot + h * stride_oh
        q_tile = tl.load(q + q_at[:, None] + d, mask=real[:, None] & (d < D), other=0.0)
        do_tile = tl.load(d_out + o_at[:, None] + d_v, mask=real[:, None] & (d_v < DV), other=0.0)
        log_total, row_delta, row_gate, end = rows_of(
            lse, delta, gate, last,
            (b * T + t) * (G * GROUP) + h, b * stride_lb + t * stride_lt, S, real,
        )  # fmt: skip

        logits = logits_of(dot(q_tile, k_tile.T), scale, softcap)
        seen = real_key[None, :] & ((slot + key)[None, :] <= end[:, None])
        weights = tl.exp2(tl.where(seen, logits, float("-inf")) - log_total[:, None])
        d_weights = dot(do_tile, v_tile.T)
        gated = weights
        if gate is not None:
            gated *= row_gate[:, None]
            d_weights *= row_gate[:, None]
        dv_tile += dot(gated.to(do_tile.dtype).T, do_tile)
        d_logits = weights * (d_weights - row_delta[:, None]) * slope(logits, softcap)
        dk_tile += dot(d_logits.to(q_tile.dtype).T, q_tile)

    at = (b * S + slot + key) * G + g
    inside = (slot + key < S)[:, None]
    tl.atomic_add(dk + at[:, None] * D + d, dk_tile * scale, mask=inside & (d < D), sem="relaxed")
    tl.atomic_add(dv + at[:, None] * DV + d_v, dv_tile, mask=inside & (d_v < DV), sem="relaxed")
