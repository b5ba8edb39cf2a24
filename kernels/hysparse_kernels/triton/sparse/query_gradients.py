"""dQ of block-sparse attention.

Tiles of neighbouring queries go through the blocks common in their lists, masked; the rare ones go
by key block, to exactly the queries that chose them, and their parts are added to the tile's.
"""

import triton
import triton.language as tl

from hysparse_kernels.triton.sparse.forward import logits_of, real_keys
from hysparse_kernels.triton.sparse.key_gradients import rows_of, slope
from hysparse_kernels.triton.sparse.pairs import pass_of
from hysparse_kernels.triton.tiles import dot


@triton.jit(
    do_not_specialize=[
        "T", "S", "stride_lb", "stride_mb", "scale", "softcap", "num_lists", "bins", "turn",
        "programs",
    ]
)  # fmt: skip
def differentiate_pairs(
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
    d_part,
    queries,
    places,
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
    turn,
    programs,
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
    part = tl.program_id(0) % PARTS
    row = tl.arange(0, ROWS)
    query, head = row // HEADS, row % HEADS
    d, d_v, key = tl.arange(0, PADDED_D), tl.arange(0, PADDED_DV), tl.arange(0, KEYS)
    bins_before = turn.to(tl.int64) * num_lists * bins
    first_item = tl.load(item_ends + bins_before - 1, mask=bins_before > 0, other=0)
    last_item = tl.load(item_ends + bins_before + num_lists * bins - 1)
    for item in range(first_item + tl.program_id(0) // PARTS, last_item, programs):
        bin = tl.load(item_bins + item).to(tl.int64)
        begin = tl.load(item_begins + item)
        count = tl.minimum(tl.load(ends + bin) - begin, ITEM).to(tl.int32)
        slot = (bin % bins).to(tl.int32) * SLOTS_PER_BIN + part * KEYS
        g, b = bin // bins % G, bin // bins % num_lists // G
        h = g * GROUP + head
        k_tile = k_desc.load([b.to(tl.int32), g.to(tl.int32), slot, 0]).reshape(KEYS, PADDED_D)
        v_tile = v_desc.load([b.to(tl.int32), g.to(tl.int32), slot, 0]).reshape(KEYS, PADDED_DV)
        if mask is not None:
            real_key = real_keys(mask + b * stride_mb, stride_ms, slot + key, S)
        for i in tl.range(0, count, QUERIES, num_stages=STAGES):
            real = (i + query < count) & (head < GROUP)
            t = tl.load(queries + begin + i + query, mask=real, other=0).to(tl.int64)
            q_at = b * stride_qb + t * stride_qt + h * stride_qh
            o_at = b * stride_ob + t * stride_ot + h * stride_oh
            q_tile = tl.load(q + q_at[:, None] + d, mask=real[:, None] & (d < D), other=0.0)
            do_tile = tl.load(
                d_out + o_at[:, None] + d_v, mask=real[:, None] & (d_v < DV), other=0.0
            )
            log_total, row_delta, row_gate, end = rows_of(
                lse, delta, gate, last,
                (b * T + t) * (G * GROUP) + h, b * stride_lb + t * stride_lt, S, real,
            )  # fmt: skip
            place = tl.load(places + begin + i + query, mask=real, other=0).to(tl.int64)

            logits = logits_of(dot(q_tile, k_tile.T), scale, softcap)
            seen = (slot + key)[None, :] <= end[:, None]
            if mask is not None:
                seen &= real_key[None, :]
            weights = tl.exp2(tl.where(seen, logits, float("-inf")) - log_total[:, None])
            d_weights = dot(do_tile, v_tile.T)
            if gate is not None:
                d_weights *= row_gate[:, None]
            d_logits = weights * (d_weights - row_delta[:, None]) * slope(logits, softcap)
            dq_tile = dot(d_logits.to(k_tile.dtype), k_tile)
            at = (place * PARTS + part) * GROUP + head
            tl.store(
                d_part + at[:, None] * D + d,
                dq_tile.to(d_part.dtype.element_ty),
                mask=real[:, None] & (d < D),
            )


@triton.jit(
    do_not_specialize=["T", "S", "stride_lb", "stride_mb", "scale", "softcap", "turn", "at_once"]
)
def differentiate_tiles(
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
    dq,
    starts,
    members,
    counts,
    tile_pairs,
    tile_ends,
    query_begins,
    query_counts,
    d_part,
    scale,
    softcap,
    T,
    S,
    G,
    turn,
    at_once,
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
    base = pid * 0
    if d_part is not None:
        own_turn, base = pass_of(pid, tile_pairs, tile_ends, at_once)
        if own_turn != turn:
            return

    row = tl.arange(0, ROWS)
    query, head = part * (QUERIES // SPLIT) + row // HEADS, row % HEADS
    t = tile * QUERIES + query
    real = (t < T) & (head < GROUP)
    h = g * GROUP + head
    d, d_v, key = tl.arange(0, PADDED_D), tl.arange(0, PADDED_DV), tl.arange(0, KEYS)
    acc = tl.zeros([ROWS, PADDED_D], tl.float32)
    if d_part is not None:
        begin = base + tl.load(query_begins + pid * QUERIES + query)
        count = tl.load(query_counts + pid * QUERIES + query)
        for j in range(0, tl.max(count, 0) * PARTS):
            has = real & (j < count * PARTS)
            at = (begin * PARTS + j) * GROUP + head
            partial = tl.load(d_part + at[:, None] * D + d, mask=has[:, None] & (d < D), other=0.0)
            acc += partial.to(tl.float32)

    q_at = b * stride_qb + t * stride_qt + h * stride_qh
    o_at = b * stride_ob + t * stride_ot + h * stride_oh
    q_tile = tl.load(q + q_at[:, None] + d, mask=real[:, None] & (d < D), other=0.0)
    do_tile = tl.load(d_out + o_at[:, None] + d_v, mask=real[:, None] & (d_v < DV), other=0.0)
    own = (b * T + t) * (G * GROUP) + h
    log_total, row_delta, row_gate, end = rows_of(
        lse, delta, gate, last, own, b * stride_lb + t * stride_lt, S, real
    )
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
        weights = tl.exp2(tl.where(seen, logits, float("-inf")) - log_total[:, None])
        d_weights = dot(do_tile, v_tile.T)
        if gate is not None:
            d_weights *= row_gate[:, None]
        d_logits = weights * (d_weights - row_delta[:, None]) * slope(logits, softcap)
        acc += dot(d_logits.to(k_tile.dtype), k_tile)

    tl.store(
        dq + own[:, None] * D + d,
        (acc * scale).to(dq.dtype.element_ty),
        mask=real[:, None] & (d < D),
    )
