"""Sliding window attention, backward: one kernel for the queries, one for the keys and values.

With P the weights, d_out_i = gate_i * d_out_i of each row and delta_i = d_out_i . out_i:

    dV = P^T d_out,  dS = P * (d_out V^T - delta),  dQ = scale * dS K,  dK = scale * dS^T Q
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import describe, last_contiguous
from hysparse_kernels.triton.full.key_gradients import find_queries
from hysparse_kernels.triton.tiles import LOG2_E, dot, tanh
from hysparse_kernels.triton.window.forward import (
    causal_window_of,
    describe_rows,
    range_arguments,
    sees,
    window_of,
)


def window_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_range: KeyRange,
    *,
    window_tokens: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    gate: Tensor | None = None,
    dq_add: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of ``window_forward``.

    Args:
        d_out: (B, T, H, Dv), the gradient of ``gate * out``. q, k, v: the forward's inputs.
        lse: (B, T, H) float32, the forward's. delta: (B, T, H) float32, of ``gate * d_out``.
        gate: (B, T, H) float32 scales the rows of d_out, or None.
        dq_add: (B, T, H, D), added to dq, which may then lie in its memory; or None.
    Returns: dq, dk and dv in q's dtype; dsinks (H,) float32 or None.
    """
    B, T, H, D = q.shape
    S, G, Dv = v.shape[1:]
    dk, dv = k.new_empty(B, S, G, D), v.new_empty(B, S, G, Dv)
    if not B or not T or not S:  # nothing is seen
        dq = q.new_zeros(B, T, H, D) if dq_add is None else dq_add
        dsinks = None if sinks is None else sinks.new_zeros(H, dtype=torch.float32)
        return dq, dk.zero_(), dv.zero_(), dsinks
    dq_add = None if dq_add is None else dq_add.contiguous()
    dq = q.new_empty(B, T, H, D) if dq_add is None else dq_add
    q, d_out = last_contiguous(q), last_contiguous(d_out)
    lse, delta = lse.contiguous(), delta.contiguous()
    gate = None if gate is None else gate.contiguous()
    ranges = range_arguments(key_range)
    padded_d, padded_dv = triton.next_power_of_2(D), triton.next_power_of_2(Dv)
    heads = triton.next_power_of_2(H // G)
    shared = {
        "GROUP": H // G,
        "HEADS": heads,
        "D": D,
        "DV": Dv,
        "PADDED_D": padded_d,
        "PADDED_DV": padded_dv,
    }
    numbers = (min(window_tokens, S), scale, softcap, T, S, G)

    rows, keys, num_warps, num_stages = _query_configuration(q.dtype)
    queries = max(1, rows // heads)
    tiles = triton.cdiv(T, queries)
    sink_parts = None if sinks is None else q.new_empty(B * tiles, H, dtype=torch.float32)
    # (2, B * G, rows): of each row the lse that its gate is folded into, and delta / gate.
    rows_of = q.new_empty(2, B * G, tiles * queries * heads, dtype=torch.float32)
    _queries_backward[(tiles * G * B,)](
        d_out,
        *d_out.stride()[:3],
        q,
        *q.stride()[:3],
        describe(k, keys, padded_d),
        describe(v, keys, padded_dv),
        lse,
        delta,
        gate,
        *ranges,
        sinks,
        sink_parts,
        *rows_of,
        None if dq_add is None else describe_rows(dq_add, G, queries, heads, padded_d),
        describe_rows(dq, G, queries, heads, padded_d),
        *numbers,
        QUERIES=queries,
        KEYS=keys,
        STAGES=num_stages,
        num_warps=num_warps,
        **shared,
    )
    rows, keys, num_warps, num_stages = _key_configuration(q.dtype, padded_d + padded_dv)
    queries = max(1, rows // heads)
    bounds = None  # of the queries whose windows reach a key tile
    if key_range.diagonal is None:
        bounds = torch.empty(B, triton.cdiv(S, keys), 4, dtype=torch.int32, device=q.device)
        find_queries[(triton.cdiv(S, keys) * B,)](
            *ranges[:6], bounds, numbers[0], B, T, S, KEYS=keys, ROWS=queries, CHUNK=1024
        )
    _keys_backward[(triton.cdiv(S, keys) * G * B,)](
        describe_rows(d_out, G, queries, heads, padded_dv),
        describe_rows(q, G, queries, heads, padded_d),
        describe(k, keys, padded_d),
        describe(v, keys, padded_dv),
        *(
            TensorDescriptor(x, list(x.shape), list(x.stride()), [1, queries * heads])
            for x in rows_of
        ),
        *ranges,
        bounds,
        dk,
        dv,
        *numbers,
        QUERIES=queries,
        KEYS=keys,
        STAGES=num_stages,
        num_warps=num_warps,
        **shared,
    )
    return dq, dk, dv, None if sink_parts is None else sink_parts.sum(0)


def _query_configuration(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows, keys a step, warps and pipeline stages.

    Measured on an H200 at 32/8 heads x 128, 32k tokens, window 128: 0.438 ms. 128 rows: 0.468 ms;
    with 64 keys 0.636 ms.
    """
    return (32, 32, 8, 1) if dtype == torch.float32 else (64, 32, 4, 2)


def _key_configuration(dtype: torch.dtype, width: int) -> tuple[int, int, int, int]:
    """Rows a step, keys, warps and pipeline stages for D + Dv padded.

    Measured as above: 0.470 ms. Three stages: 0.583 ms. 128 keys in 8 warps: 0.697 ms.
    """
    if dtype == torch.float32:
        return 32, 32, 8, 1
    return (64, 64, 4, 2) if width <= 256 else (32, 64, 8, 2)


@triton.jit
def _weights(products, seen, lse, scale, softcap):
    """exp(logits - lse) where seen, 0 elsewhere; lse in base 2."""
    if softcap is not None:
        logits = (softcap * LOG2_E) * tanh(products * (scale / softcap))
    else:
        logits = products * (scale * LOG2_E)
    return tl.exp2(tl.where(seen, logits, float("-inf")) - lse)


@triton.jit
def _slope(products, scale, softcap):
    """The derivative of a soft-capped logit by the logit."""
    capped = tanh(products * (scale / softcap))
    return 1 - capped * capped


@triton.jit(
    do_not_specialize=[
        "stride_fb", "stride_lb", "stride_mb", "diagonal", "window", "scale", "softcap", "T", "S"
    ]
)  # fmt: skip
def _queries_backward(
    d_out,
    stride_ob,
    stride_ot,
    stride_oh,
    q,
    stride_qb,
    stride_qt,
    stride_qh,
    k_desc,
    v_desc,
    lse,
    delta,
    gate,
    first,
    stride_fb,
    stride_ft,
    last,
    stride_lb,
    stride_lt,
    mask,
    stride_mb,
    stride_ms,
    diagonal,
    sinks,
    sink_parts,
    folded_lse,
    folded_delta,
    add_desc,
    dq_desc,
    window,
    scale,
    softcap,
    T,
    S,
    G,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = QUERIES * HEADS
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(T, QUERIES)
    g, tile, b = pid % G, pid // G % tiles, pid // G // tiles

    row = tl.arange(0, ROWS)
    head = row % HEADS
    t = tile * QUERIES + row // HEADS
    real = (t < T) & (head < GROUP)
    h = g * GROUP + head
    d, dv, key = tl.arange(0, PADDED_D), tl.arange(0, PADDED_DV), tl.arange(0, KEYS)
    if diagonal is not None:
        start, count, begin, end = causal_window_of(
            diagonal, (tile * QUERIES).to(tl.int32), t.to(tl.int32), QUERIES, T, window
        )
    else:
        start, count, begin, end = window_of(
            first, stride_fb, stride_ft, last, stride_lb, stride_lt, b, t, real, window, S
        )
    q_at = b * stride_qb + t * stride_qt + h * stride_qh
    q_tile = tl.load(q + q_at[:, None] + d, mask=real[:, None] & (d < D), other=0.0)
    o_at = b * stride_ob + t * stride_ot + h * stride_oh
    o_tile = tl.load(d_out + o_at[:, None] + dv, mask=real[:, None] & (dv < DV), other=0.0)
    at = (b * T + t) * (G * GROUP) + h
    # A row that sees nothing, or is none, gets an infinite lse: all its weights are 0.
    row_lse = tl.load(lse + at, mask=real, other=float("-inf")) * LOG2_E
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    row_delta = tl.load(delta + at, mask=real, other=0.0)
    if sinks is not None:
        sink = tl.load(sinks + h, mask=real, other=0.0).to(tl.float32) * LOG2_E
        part = -tl.exp2(sink - row_lse) * row_delta
        part = tl.sum(tl.reshape(part, [QUERIES, HEADS]), 0)
        heads = tl.arange(0, HEADS)
        sink_at = ((b * tiles + tile) * G + g) * GROUP + heads
        tl.store(sink_parts + sink_at, part, mask=heads < GROUP)
    if gate is not None:  # gate * P = exp(logits - (lse - log gate))
        row_gate = tl.load(gate + at, mask=real, other=0.0)
        open_gate = row_gate > 0
        row_gate = tl.where(open_gate, row_gate, 1.0)
        row_lse = tl.where(open_gate, row_lse - tl.log2(row_gate), float("inf"))
        row_delta = tl.where(open_gate, row_delta / row_gate, 0.0)
    folded_at = ((b * G + g) * tiles + tile) * ROWS + row
    tl.store(folded_lse + folded_at, row_lse)
    tl.store(folded_delta + folded_at, row_delta)

    acc = tl.zeros([ROWS, PADDED_D], tl.float32)
    for slot in tl.range(begin, end, KEYS, num_stages=STAGES):
        k_tile = k_desc.load([b.to(tl.int32), g.to(tl.int32), slot, 0]).reshape(KEYS, PADDED_D)
        v_tile = v_desc.load([b.to(tl.int32), g.to(tl.int32), slot, 0]).reshape(KEYS, PADDED_DV)
        seen = sees((slot + key)[None, :], start[:, None], count[:, None])
        if mask is not None:
            mask_at = b * stride_mb + (slot + key).to(tl.int64) * stride_ms
            seen &= tl.load(mask + mask_at, mask=slot + key < S, other=0)[None, :] != 0
        products = dot(q_tile, k_tile.T)
        weights = _weights(products, seen, row_lse[:, None], scale, softcap)
        d_logits = weights * (dot(o_tile, v_tile.T) - row_delta[:, None])
        if softcap is not None:
            d_logits *= _slope(products, scale, softcap)
        acc += dot(d_logits.to(k_tile.dtype), k_tile)
    acc *= scale
    corner = [b.to(tl.int32), (tile * QUERIES).to(tl.int32), g.to(tl.int32), 0, 0]
    if add_desc is not None:
        acc += add_desc.load(corner).reshape(ROWS, PADDED_D).to(tl.float32)
    dq_desc.store(corner, acc.to(dq_desc.dtype).reshape([1, QUERIES, 1, HEADS, PADDED_D]))


@triton.jit(
    do_not_specialize=[
        "stride_fb", "stride_lb", "stride_mb", "diagonal", "window", "scale", "softcap", "T", "S"
    ]
)  # fmt: skip
def _keys_backward(
    d_out_desc,
    q_desc,
    k_desc,
    v_desc,
    lse_desc,
    delta_desc,
    first,
    stride_fb,
    stride_ft,
    last,
    stride_lb,
    stride_lt,
    mask,
    stride_mb,
    stride_ms,
    diagonal,
    bounds,
    dk,
    dv,
    window,
    scale,
    softcap,
    T,
    S,
    G,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = QUERIES * HEADS
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(S, KEYS)
    g, tile, b = pid % G, pid // G % tiles, pid // G // tiles
    b32, g32 = b.to(tl.int32), g.to(tl.int32)

    slot = tile.to(tl.int32) * KEYS + tl.arange(0, KEYS)
    k_tile = k_desc.load([b32, g32, tile.to(tl.int32) * KEYS, 0]).reshape(KEYS, PADDED_D)
    v_tile = v_desc.load([b32, g32, tile.to(tl.int32) * KEYS, 0]).reshape(KEYS, PADDED_DV)
    real_slot = slot < S
    if mask is not None:
        real_slot &= tl.load(mask + b * stride_mb + slot * stride_ms, mask=slot < S, other=0) != 0

    # The queries whose windows reach these slots.
    if diagonal is not None:
        begin = tl.maximum(tile.to(tl.int32) * KEYS - diagonal, 0)
        begin = begin // 4 * 4  # rows of a query or more are copied, from multiples of 16 bytes
        end = tl.minimum(tile.to(tl.int32) * KEYS + KEYS - 1 + window - diagonal, T)
    else:
        bounds += (b * tiles + tile) * 4
        begin = tl.load(bounds) * QUERIES
        end = tl.minimum(tl.load(bounds + 3) * QUERIES, T)
    row = tl.arange(0, ROWS)
    acc_k = tl.zeros([KEYS, PADDED_D], tl.float32)
    acc_v = tl.zeros([KEYS, PADDED_DV], tl.float32)
    for query in tl.range(begin, end, QUERIES, num_stages=STAGES):
        q_tile = q_desc.load([b32, query, g32, 0, 0]).reshape(ROWS, PADDED_D)
        o_tile = d_out_desc.load([b32, query, g32, 0, 0]).reshape(ROWS, PADDED_DV)
        row_lse = lse_desc.load([(b * G + g).to(tl.int32), query * HEADS]).reshape(ROWS)
        row_delta = delta_desc.load([(b * G + g).to(tl.int32), query * HEADS]).reshape(ROWS)
        t = query + row // HEADS
        if diagonal is not None:
            end_slot = diagonal + t
        else:
            end_slot = tl.load(last + b * stride_lb + t * stride_lt, mask=t < T, other=-1)
            end_slot = end_slot.to(tl.int32)
        start = tl.maximum(end_slot - window + 1, 0)
        if first is not None:
            own = tl.load(first + b * stride_fb + t * stride_ft, mask=t < T, other=0)
            start = tl.maximum(start, own.to(tl.int32))
        count = tl.maximum(end_slot - start + 1, 0)
        seen = sees(slot[:, None], start[None, :], count[None, :])
        if mask is not None:
            seen &= real_slot[:, None]
        products = dot(k_tile, q_tile.T)
        weights = _weights(products, seen, row_lse[None, :], scale, softcap)
        acc_v += dot(weights.to(o_tile.dtype), o_tile)
        d_logits = weights * (dot(v_tile, o_tile.T) - row_delta[None, :])
        if softcap is not None:
            d_logits *= _slope(products, scale, softcap)
        if first is not None:  # a slot before a document's first may hold NaN
            d_logits = tl.where(seen, d_logits, 0.0)
        acc_k += dot(d_logits.to(q_tile.dtype), q_tile)

    at = ((b * S + slot) * G + g)[:, None]
    d, column = tl.arange(0, PADDED_D), tl.arange(0, PADDED_DV)
    inside = (slot < S)[:, None]
    acc_k *= scale
    tl.store(dk + at * D + d, acc_k.to(dk.dtype.element_ty), mask=inside & (d < D))
    tl.store(dv + at * DV + column, acc_v.to(dv.dtype.element_ty), mask=inside & (column < DV))
