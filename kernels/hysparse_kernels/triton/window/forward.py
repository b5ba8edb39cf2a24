"""Sliding window attention with sinks, forward; with the gated sum of both branches, if wanted."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import (
    describe,
    describe_tiles,
    last_contiguous,
    leaves_out,
    strides_of,
)
from hysparse_kernels.triton.tiles import LN_2, LOG2_E, dot, tanh


def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    *,
    window_tokens: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    o_sparse: Tensor | None = None,
    gate_logits: Tensor | None = None,
    keep_out: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Attend each query to itself and the ``window_tokens - 1`` slots before it (HySparse eq. 4-5).

    With ``o_sparse`` and ``gate_logits`` also eq. 8-9, from ``out`` before it is rounded:

        gated = sigmoid(gate_logits[..., 0]) * o_sparse + sigmoid(gate_logits[..., 1]) * out

    Args:
        q: (B, T, H, D). k: (B, S, G, D), H a multiple of G. v: (B, S, G, Dv).
        sinks: (H,) logits added to the denominator, or None.
        o_sparse: (B, T, H, Dv). gate_logits: (B, T, H, 2). Both or neither.
        keep_out: False, where only ``gated`` is wanted, leaves ``out`` unwritten.
    Returns: out (B, T, H, Dv) or None; lse (B, T, H) float32; gated as out, or None without gates.
    """
    B, T, H, D = q.shape
    S, G, Dv = v.shape[1:]
    gated_too = o_sparse is not None and gate_logits is not None
    out = q.new_empty(B, T, H, Dv) if keep_out or not gated_too else None
    gated = q.new_empty(B, T, H, Dv) if gated_too else None
    lse = q.new_empty(B, T, H, dtype=torch.float32)
    if not lse.numel():
        return out, lse, gated
    if not S:  # a descriptor needs a slot; no query sees it
        k, v = k.new_zeros(B, 1, G, D), v.new_zeros(B, 1, G, Dv)
    q = last_contiguous(q)
    if gate_logits is not None:
        gate_logits = gate_logits.contiguous()
    padded_d, padded_dv = triton.next_power_of_2(D), triton.next_power_of_2(Dv)
    heads = triton.next_power_of_2(H // G)
    rows, keys, num_warps, num_stages = _configuration(q.dtype)
    queries = max(1, rows // heads)
    tile = (queries, heads)
    _attend[(triton.cdiv(T, queries) * G * B,)](
        q,
        *q.stride()[:3],
        describe(k, keys, padded_d),
        describe(v, keys, padded_dv),
        *range_arguments(key_range),
        sinks,
        None if out is None else describe_rows(out, G, *tile, padded_dv),
        lse,
        None if o_sparse is None else describe_rows(o_sparse, G, *tile, padded_dv),
        gate_logits,
        None if gated is None else describe_rows(gated, G, *tile, padded_dv),
        min(window_tokens, max(S, 1)),
        scale,
        softcap,
        T,
        S,
        G,
        QUERIES=queries,
        GROUP=H // G,
        HEADS=heads,
        KEYS=keys,
        D=D,
        PADDED_D=padded_d,
        PADDED_DV=padded_dv,
        HIDES=leaves_out(key_range, T, S),
        STAGES=num_stages,
        num_warps=num_warps,
    )
    return out, lse, gated


def describe_rows(x: Tensor, G: int, queries: int, heads: int, columns: int) -> TensorDescriptor:
    """``x`` (B, T, H, D) for tiles (1, queries, 1, heads, columns) at (b, t, g, 0, 0)."""
    return describe_tiles(x.unflatten(2, (G, -1)), [1, queries, 1, heads, columns])


def range_arguments(key_range: KeyRange) -> tuple[Tensor | int | None, ...]:
    """first, last and mask with their strides, 0 where one row serves the batch; and diagonal."""
    arguments: list[Tensor | int | None] = []
    for x in (key_range.first, key_range.last, key_range.mask):
        arguments += [x, *strides_of(x)]
    return (*arguments, key_range.diagonal)


def _configuration(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows, keys a step, warps and pipeline stages: small tiles, so that four programs share an SM.

    Measured on an H200 at 32/8 heads x 128, 32k tokens, window 128: 0.309 ms. 128 rows: 0.341 ms
    with three stages, 0.360 ms with two. 64 keys: 0.415 ms.
    """
    return (32, 32, 8, 1) if dtype == torch.float32 else (64, 32, 4, 2)


@triton.jit
def window_of(first, stride_fb, stride_ft, last, stride_lb, stride_lt, b, t, real, window, S):
    """The first slot that each query sees, how many from there on, and the span of all; int32."""
    end = tl.load(last + b * stride_lb + t * stride_lt, mask=real, other=-1).to(tl.int32)
    start = tl.maximum(end - window + 1, 0)
    if first is not None:
        own = tl.load(first + b * stride_fb + t * stride_ft, mask=real, other=0).to(tl.int32)
        start = tl.maximum(start, own)
    end = tl.minimum(end, S - 1)
    count = tl.maximum(end - start + 1, 0)
    begin = tl.min(tl.where(count > 0, start, 2**31 - 1))
    return start, count, begin, tl.max(tl.where(count > 0, end + 1, 0))


@triton.jit
def causal_window_of(diagonal, query, t, QUERIES: tl.constexpr, T, window):
    """``window_of`` queries from ``query`` on, where t sees slots up to diagonal + t: no loads."""
    end = diagonal + t
    start = tl.maximum(end - window + 1, 0)
    begin = tl.maximum(diagonal + query - window + 1, 0)
    return start, tl.maximum(end - start + 1, 0), begin, diagonal + min(query + QUERIES, T)


@triton.jit
def sees(slots, start, count):
    """Whether start <= slots < start + count, in one comparison."""
    return (slots - start).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit(
    do_not_specialize=[
        "stride_fb", "stride_lb", "stride_mb", "diagonal", "window", "scale", "softcap", "T", "S"
    ]
)  # fmt: skip
def _attend(
    q,
    stride_qb,
    stride_qt,
    stride_qh,
    k_desc,
    v_desc,
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
    out_desc,
    lse,
    sparse_desc,
    gate_logits,
    gated_desc,
    window,
    scale,
    softcap,
    T,
    S,
    G,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    HIDES: tl.constexpr,
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
    d, key = tl.arange(0, PADDED_D), tl.arange(0, KEYS)
    if diagonal is not None:
        start, count, begin, end = causal_window_of(
            diagonal, (tile * QUERIES).to(tl.int32), t.to(tl.int32), QUERIES, T, window
        )
    else:
        start, count, begin, end = window_of(
            first, stride_fb, stride_ft, last, stride_lb, stride_lt, b, t, real, window, S
        )
    # Through registers, so that the products take q from shared memory.
    q_at = b * stride_qb + t * stride_qt + h * stride_qh
    q_tile = tl.load(q + q_at[:, None] + d, mask=real[:, None] & (d < D), other=0.0)

    # The pivot is finite, so that a row without keys makes no NaN.
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DV], tl.float32)
    for slot in tl.range(begin, end, KEYS, num_stages=STAGES):
        k_tile = k_desc.load([b.to(tl.int32), g.to(tl.int32), slot, 0]).reshape(KEYS, PADDED_D)
        v_tile = v_desc.load([b.to(tl.int32), g.to(tl.int32), slot, 0]).reshape(KEYS, PADDED_DV)
        if softcap is not None:
            logits = (softcap * LOG2_E) * tanh(dot(q_tile, k_tile.T) * (scale / softcap))
        else:
            logits = dot(q_tile, k_tile.T) * (scale * LOG2_E)
        seen = sees((slot + key)[None, :], start[:, None], count[:, None])
        shown = slot + key < end  # by some query of the tile
        if mask is not None:
            at = b * stride_mb + (slot + key).to(tl.int64) * stride_ms
            shown &= tl.load(mask + at, mask=slot + key < S, other=0) != 0
            seen &= shown[None, :]
        if HIDES:  # 0 * NaN is NaN
            v_tile = tl.where(shown[:, None], v_tile, 0.0)
        logits = tl.where(seen, logits, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc += dot(weights.to(v_tile.dtype), v_tile)
        peak = new_peak

    if sinks is not None:
        sink = tl.load(sinks + h, mask=real, other=0.0).to(tl.float32) * LOG2_E
        new_peak = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.exp2(sink - new_peak)
        acc *= shrink[:, None]
        peak = new_peak
    unseen = total == 0
    total = tl.where(unseen, 1.0, total)
    acc = acc / total[:, None]
    at = (b * T + t) * (G * GROUP) + h
    log_total = tl.where(unseen, float("-inf"), (peak + tl.log2(total)) * LN_2)
    tl.store(lse + at, log_total, mask=real)
    corner = [b.to(tl.int32), (tile * QUERIES).to(tl.int32), g.to(tl.int32), 0, 0]
    whole: tl.constexpr = [1, QUERIES, 1, HEADS, PADDED_DV]
    if out_desc is not None:
        out_desc.store(corner, acc.to(out_desc.dtype).reshape(whole))
    if gated_desc is not None:
        gate_sparse = tl.sigmoid(tl.load(gate_logits + 2 * at, mask=real, other=0.0).to(tl.float32))
        gate_window = tl.sigmoid(
            tl.load(gate_logits + 2 * at + 1, mask=real, other=0.0).to(tl.float32)
        )
        sparse = sparse_desc.load(corner).reshape(ROWS, PADDED_DV).to(tl.float32)
        acc = gate_window[:, None] * acc + gate_sparse[:, None] * sparse
        gated_desc.store(corner, acc.to(gated_desc.dtype).reshape(whole))
