"""A sparse layer's attention for few queries: both branches and their gated sum in one launch.

Each program attends to one part of one branch's keys; the last of a query's programs to finish
merges the parts, applies sinks and gates, and writes the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import last_contiguous, strides_of
from hysparse_kernels.triton.full.decode import attend_tile
from hysparse_kernels.triton.tiles import LOG2_E

PROGRAMS_WANTED = 2 * 132  # that fill a large GPU
ARENA = 1 << 20  # counters

# For each device, counters at 0, and those in use by each stream's launches outside of graphs.
_arenas: dict[torch.device, Tensor] = {}
_taken: dict[torch.device, int] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def sparse_decode(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    block_idx: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gate_logits: Tensor,
    key_range: KeyRange,
    window_range: KeyRange,
    *,
    block_size: int,
    window_tokens: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Block-sparse and sliding window attention, gated and summed (HySparse eq. 4-9).

    Args:
        q: (B, T, H, D). shared_k: (B, S, G, D), shared_v: (B, S, G, Dv), of the full layer.
        block_idx: (B, T, G, K) int32, distinct in a list, -1 pads anywhere.
        window_k: (B, S', G, D), window_v: (B, S', G, Dv), the layer's own.
        gate_logits: (B, T, H, 2), block-sparse branch first.
        key_range: over the shared keys. window_range: over the layer's own.
        block_size: tokens in a key block, a power of two from 16 to 128.
        sinks: (H, 2) logits added to the branches' denominators, or None.
    Returns: (B, T, H, Dv) in q's dtype.
    """
    B, T, H, D = q.shape
    S, G, Dv = shared_v.shape[1:]
    K, group = block_idx.shape[3], H // G
    out = q.new_empty(B, T, H, Dv)
    if not out.numel():
        return out
    q, shared_k, shared_v, window_k, window_v = (
        last_contiguous(x) for x in (q, shared_k, shared_v, window_k, window_v)
    )
    queries = B * T * G
    keys, num_warps, num_stages = _configuration(q, Dv)
    sparse_parts, window_parts = _parts(
        queries, -(-K * block_size // keys), -(-window_tokens // keys)
    )
    parts = sparse_parts + window_parts
    partial_out = q.new_empty(queries, parts, group, Dv, dtype=torch.float32)
    partial_sum = q.new_empty(2, queries, parts, group, dtype=torch.float32)
    ranges = key_range, window_range
    firsts, masks = [r.first for r in ranges], [r.mask for r in ranges]
    _attend[(queries * parts,)](
        q,
        *q.stride()[:3],
        shared_k,
        *shared_k.stride()[:3],
        shared_v,
        *shared_v.stride()[:3],
        window_k,
        *window_k.stride()[:3],
        window_v,
        *window_v.stride()[:3],
        block_idx,
        *block_idx.stride(),
        gate_logits,
        *gate_logits.stride(),
        sinks,
        *(sinks.stride() if sinks is not None else (0, 0)),
        *firsts,
        *(stride for x in firsts for stride in strides_of(x)),
        *(r.last for r in ranges),
        *(stride for r in ranges for stride in strides_of(r.last)),
        *masks,
        *(stride for x in masks for stride in strides_of(x)),
        partial_out,
        partial_sum,
        _counters(q.device, queries),
        out,
        scale,
        softcap,
        T,
        S,
        window_k.shape[1],
        G,
        K,
        window_tokens,
        queries,
        SPARSE_PARTS=sparse_parts,
        WINDOW_PARTS=window_parts,
        ROWS=max(16, triton.next_power_of_2(group)),
        GROUP=group,
        HEADS=triton.next_power_of_2(group),
        BLOCK=block_size,
        KEYS=keys,
        D=D,
        DV=Dv,
        PADDED_D=triton.next_power_of_2(D),
        PADDED_DV=triton.next_power_of_2(Dv),
        STAGES=num_stages,
        num_warps=num_warps,
    )
    return out


def _parts(queries: int, sparse_tiles: int, window_tiles: int) -> tuple[int, int]:
    """Parts of each branch's keys, by their work: powers of two, since each is compiled for."""
    wanted = max(2, PROGRAMS_WANTED // queries)

    def of(tiles: int) -> int:
        parts = min(tiles, -(-wanted * tiles // (sparse_tiles + window_tiles)))
        return 1 << (max(1, parts).bit_length() - 1)

    return of(sparse_tiles), of(window_tiles)


def _configuration(q: Tensor, v_dim: int) -> tuple[int, int, int]:
    """Keys of a tile, warps, pipeline stages."""
    if q.dtype == torch.float32:
        return 16, 4, 1
    return (64, 4, 3) if q.shape[3] + v_dim <= 256 else (32, 4, 3)


def _counters(device: torch.device, count: int) -> Tensor:
    """int32 counters at 0, which a launch leaves at 0, and which no other launch uses meanwhile.

    A launch in a CUDA graph keeps its own for ever, a stream's others share theirs. They come from
    one allocation outside of all graphs, since a memset in a graph would cost a launch.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream
    if not capturing and (device, stream) in _of_stream:
        counters = _of_stream[device, stream]
        if len(counters) >= count:
            return counters
    taken = _taken.get(device, ARENA)
    if taken + count > ARENA:
        if capturing or count > ARENA:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _arenas[device], taken = torch.zeros(ARENA, dtype=torch.int32, device=device), 0
    _taken[device] = taken + count
    counters = _arenas[device][taken : taken + count]
    if not capturing:
        _of_stream[device, stream] = counters
    return counters


@triton.jit(
    do_not_specialize=[
        "shared_first_b", "window_first_b", "shared_last_b", "window_last_b", "shared_mask_b",
        "window_mask_b", "scale", "softcap", "T", "S", "window_S", "G", "K", "window_tokens",
        "queries",
    ]
)  # fmt: skip
def _attend(
    q, stride_qb, stride_qt, stride_qh,
    shared_k, shared_kb, shared_ks, shared_kg,
    shared_v, shared_vb, shared_vs, shared_vg,
    window_k, window_kb, window_ks, window_kg,
    window_v, window_vb, window_vs, window_vg,
    block_idx, stride_ib, stride_it, stride_ig, stride_ik,
    gate_logits, stride_gb, stride_gt, stride_gh, stride_gs,
    sinks, stride_sh, stride_ss,
    shared_first, window_first, shared_first_b, shared_first_t, window_first_b, window_first_t,
    shared_last, window_last, shared_last_b, shared_last_t, window_last_b, window_last_t,
    shared_mask, window_mask, shared_mask_b, shared_mask_s, window_mask_b, window_mask_s,
    partial_out, partial_sum, counters, out,
    scale, softcap, T, S, window_S, G, K, window_tokens, queries,
    SPARSE_PARTS: tl.constexpr, WINDOW_PARTS: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = SPARSE_PARTS + WINDOW_PARTS
    pid = tl.program_id(0).to(tl.int64)
    query, part = pid // PARTS, pid % PARTS
    g, t, b = query % G, query // G % T, query // G // T
    windowed = part >= SPARSE_PARTS

    row = tl.arange(0, ROWS)
    real = row < GROUP
    h = g * GROUP + row
    d, dv, key = tl.arange(0, PADDED_D), tl.arange(0, PADDED_DV), tl.arange(0, KEYS)
    q_at = b * stride_qb + t * stride_qt + h * stride_qh
    q_tile = tl.load(q + q_at[:, None] + d, mask=real[:, None] & (d < D), other=0.0)

    k_base = tl.where(
        windowed,
        window_k + b * window_kb + g * window_kg,
        shared_k + b * shared_kb + g * shared_kg,
    )
    v_base = tl.where(
        windowed,
        window_v + b * window_vb + g * window_vg,
        shared_v + b * shared_vb + g * shared_vg,
    )
    stride_ks = tl.where(windowed, window_ks, shared_ks)
    stride_vs = tl.where(windowed, window_vs, shared_vs)
    if windowed:
        end = tl.load(window_last + b * window_last_b + t * window_last_t)
        begin = tl.maximum(end + 1 - window_tokens, 0)
        if window_first is not None:
            first = tl.load(window_first + b * window_first_b + t * window_first_t)
            begin = tl.maximum(begin, first)
        end = tl.minimum(end, window_S - 1)
        tiles = tl.maximum((end - begin + KEYS) // KEYS, 0).to(tl.int32)
        low = tiles * (part - SPARSE_PARTS).to(tl.int32) // WINDOW_PARTS
        high = tiles * (part - SPARSE_PARTS + 1).to(tl.int32) // WINDOW_PARTS
    else:
        end = tl.minimum(tl.load(shared_last + b * shared_last_b + t * shared_last_t), S - 1)
        begin = end * 0
        if shared_first is not None:
            begin = tl.maximum(tl.load(shared_first + b * shared_first_b + t * shared_first_t), 0)
        tiles = tl.cdiv(K * BLOCK, KEYS)
        low = tiles * part.to(tl.int32) // SPARSE_PARTS
        high = tiles * (part + 1).to(tl.int32) // SPARSE_PARTS
    block_idx += b * stride_ib + t * stride_it + g * stride_ig

    # What the merge needs, in time.
    head = tl.arange(0, HEADS)
    gate_logits += b * stride_gb + t * stride_gt + (g * GROUP + head) * stride_gh
    sparse_gate = tl.load(gate_logits, mask=head < GROUP, other=0.0).to(tl.float32)
    window_gate = tl.load(gate_logits + stride_gs, mask=head < GROUP, other=0.0).to(tl.float32)
    sparse_sink = None
    window_sink = None
    if sinks is not None:
        sinks += (g * GROUP + head) * stride_sh
        sparse_sink = tl.load(sinks, mask=head < GROUP, other=0.0).to(tl.float32)
        window_sink = tl.load(sinks + stride_ss, mask=head < GROUP, other=0.0).to(tl.float32)

    # The pivot is finite, so that a row without keys makes no NaN.
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DV], tl.float32)
    chosen = tl.where(windowed, 0, K)
    block = _block(block_idx, stride_ik, low, key, chosen, BLOCK)
    for i in tl.range(low, high, num_stages=STAGES):
        place = i * KEYS + key
        slot = tl.where(windowed, place, block * BLOCK + place % BLOCK) + begin
        inside = (slot <= end) & (windowed | (block >= 0))
        block = _block(block_idx, stride_ik, i + 1, key, chosen, BLOCK)  # of the next tile
        if shared_mask is not None:
            at = shared_mask + b * shared_mask_b + slot * shared_mask_s
            inside &= tl.load(at, mask=inside & (part < SPARSE_PARTS), other=1) != 0
        if window_mask is not None:
            at = window_mask + b * window_mask_b + slot * window_mask_s
            inside &= tl.load(at, mask=inside & windowed, other=1) != 0
        at = slot[:, None]
        k_tile = tl.load(k_base + at * stride_ks + d, mask=inside[:, None] & (d < D), other=0.0)
        v_tile = tl.load(v_base + at * stride_vs + dv, mask=inside[:, None] & (dv < DV), other=0.0)
        _, peak, total, acc = attend_tile(
            q_tile, k_tile, v_tile, inside[None, :], peak, total, acc, scale, softcap
        )

    at = pid * GROUP + row
    count = queries.to(tl.int64) * PARTS * GROUP
    tl.store(partial_sum + at, peak, mask=real)
    tl.store(partial_sum + count + at, total, mask=real)
    tl.store(partial_out + at[:, None] * DV + dv, acc, mask=real[:, None] & (dv < DV))
    tl.debug_barrier()  # all of the program's stores, before it counts as done
    done = tl.atomic_add(counters + query, 1, sem="acq_rel", scope="gpu")
    if done == PARTS - 1:
        tl.debug_barrier()
        tl.store(counters + query, 0)
        base = query * PARTS
        sparse = _merged(
            partial_out, partial_sum, base, count, sparse_sink,
            SPARSE_PARTS, GROUP, HEADS, DV, PADDED_DV,
        )  # fmt: skip
        window = _merged(
            partial_out, partial_sum, base + SPARSE_PARTS, count, window_sink,
            WINDOW_PARTS, GROUP, HEADS, DV, PADDED_DV,
        )  # fmt: skip
        result = _sigmoid(sparse_gate)[:, None] * sparse + _sigmoid(window_gate)[:, None] * window
        to = out + (query * GROUP + head)[:, None] * DV + dv
        tl.store(to, result.to(out.dtype.element_ty), mask=(head < GROUP)[:, None] & (dv < DV))


@triton.jit
def _block(block_idx, stride_ik, i, key, chosen, BLOCK: tl.constexpr):
    """The listed block of each key of tile ``i``, or of them all; -1 from entry ``chosen`` on.

    int64: times the block size, a listed block may be anything.
    """
    KEYS: tl.constexpr = key.shape[0]
    entry = i * (KEYS // BLOCK) + key // BLOCK if BLOCK < KEYS else i // (BLOCK // KEYS)
    return tl.load(block_idx + entry * stride_ik, mask=entry < chosen, other=-1).to(tl.int64)


@triton.jit
def _merged(
    partial_out, partial_sum, base, count, sink,
    PARTS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr,
    PADDED_DV: tl.constexpr,
):  # fmt: skip
    """A branch's output (heads, Dv) from its parts, which begin at ``base``."""
    head, dv = tl.arange(0, HEADS), tl.arange(0, PADDED_DV)
    real = head < GROUP
    peak = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, PADDED_DV], tl.float32)
    for part in tl.static_range(PARTS):
        at = (base + part) * GROUP + head
        new_peak = tl.load(partial_sum + at, mask=real, other=-1e30, cache_modifier=".cg")
        new_total = tl.load(partial_sum + count + at, mask=real, other=0.0, cache_modifier=".cg")
        new_acc = tl.load(
            partial_out + at[:, None] * DV + dv,
            mask=real[:, None] & (dv < DV),
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(peak, new_peak)
        shrink, weight = tl.exp2((peak - higher) * LOG2_E), tl.exp2((new_peak - higher) * LOG2_E)
        total = total * shrink + new_total * weight
        acc = acc * shrink[:, None] + new_acc * weight[:, None]
        peak = higher
    seen = total > 0
    if sink is not None:
        total += tl.where(seen, tl.exp2(tl.where(seen, (sink - peak) * LOG2_E, 0.0)), 0.0)
    return acc / tl.where(seen, total, 1.0)[:, None]


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(-x * LOG2_E))
