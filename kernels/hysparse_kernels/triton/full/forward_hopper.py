"""Causal attention with block maxima for Hopper: two warpgroups compute while a warp loads.

As in FlashAttention-3 (https://arxiv.org/abs/2407.08608), a warpgroup issues the next tile's
q k^T before this tile's p v, and computes one tile's softmax while the tensor cores work.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.full.top_k import Maxima
from hysparse_kernels.triton.hopper import (
    DTYPES,
    GROUP_ROWS,
    LN_2,
    LOG2_E,
    STAGES,
    TILE_KEYS,
    TILE_ROWS,
    suits,
)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free,
    b, h, g, row, num_tiles,
):  # fmt: skip
    """One warp's work: q once, then keys and values from the diagonal backwards."""
    rows: gl.constexpr = q_smem.type.shape[3]
    keys: gl.constexpr = k_smem.type.shape[3]
    stages: gl.constexpr = k_smem.type.shape[0]
    for half in gl.static_range(2):
        mbarrier.expect(q_ready.index(half), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_desc, [b, h, row + half * rows, 0], q_ready.index(half), q_smem.index(half)
        )
    for i in range(num_tiles):
        slot = (num_tiles - 1 - i) * keys
        stage = i % stages
        phase = (i // stages) & 1
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k_desc, [b, g, slot, 0], k_ready.index(stage), k_smem.index(stage)
        )
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v_desc, [b, g, slot, 0], v_ready.index(stage), v_smem.index(stage)
        )


@gluon.jit
def _softmax(
    s, m, slot, last, t, num_queries, maxima_ptr, maxima_stride_n, num_blocks, scale,
    MASKED: gl.constexpr, BLOCK: gl.constexpr, MAXIMA: gl.constexpr,
):  # fmt: skip
    """A tile's exponentials, the running maximum after it, and what to scale the past by."""
    rows: gl.constexpr = s.shape[0]
    keys: gl.constexpr = s.shape[1]
    row_layout: gl.constexpr = m.type.layout
    if MASKED:
        columns = gl.arange(0, keys, gl.SliceLayout(0, s.type.layout))
        s = gl.where((slot + columns)[None, :] <= last[:, None], s, float("-inf"))
    if MAXIMA:
        blocks: gl.constexpr = keys // BLOCK
        tops = gl.max(gl.reshape(s, [rows, blocks, BLOCK]), axis=2)
        tops_layout: gl.constexpr = tops.type.layout
        n = slot // BLOCK + gl.arange(0, blocks, gl.SliceLayout(0, tops_layout))
        t_of_tops = gl.convert_layout(t, gl.SliceLayout(1, tops_layout), assert_trivial=True)
        where = maxima_ptr + n.to(gl.int64)[None, :] * maxima_stride_n + t_of_tops[:, None]
        inside = (n < num_blocks)[None, :] & (t_of_tops < num_queries)[:, None]
        gl.store(where, tops * scale, mask=inside)
        top = gl.convert_layout(gl.max(tops, axis=1), row_layout, assert_trivial=True)
    else:
        top = gl.max(s, axis=1)
    m_next = gl.maximum(m, top)
    pivot = m_next
    if MASKED:
        pivot = gl.where(m_next == float("-inf"), 0.0, m_next)
    alpha = gl.exp2((m - pivot) * (scale * LOG2_E))  # exactly 1 where the maximum stays
    pivot *= scale * LOG2_E
    p = gl.exp2(s * (scale * LOG2_E) - pivot[:, None])
    return p, m_next, alpha


@gluon.jit
def _attend(
    q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free, out_desc, lse_ptr,
    lse_stride_t, maxima_ptr, maxima_stride_n, peaks_ptr, totals_ptr, sinks_ptr, b, h, row,
    num_queries, num_blocks, num_tiles, num_masked, diagonal, scale,
    HALF: gl.constexpr, BLOCK: gl.constexpr, MAXIMA: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """One warpgroup's work: half of the tile's rows over all key tiles."""
    dtype: gl.constexpr = q_smem.dtype
    rows: gl.constexpr = q_smem.type.shape[3]
    dim: gl.constexpr = q_smem.type.shape[4]
    stages: gl.constexpr = k_smem.type.shape[0]
    keys: gl.constexpr = k_smem.type.shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)

    t = row + HALF * rows + gl.arange(0, rows, row_layout)
    last = diagonal + t
    m = gl.full([rows], float("-inf"), gl.float32, row_layout)
    acc = gl.zeros([rows, dim], gl.float32, o_layout)
    no_s = gl.zeros([rows, keys], gl.float32, s_layout)
    q = q_smem.index(HALF).reshape([rows, dim])

    mbarrier.wait(q_ready.index(HALF), 0)
    mbarrier.wait(k_ready.index(0), 0)
    k = k_smem.index(0).reshape([keys, dim]).permute((1, 0))
    s = warpgroup_mma(q, k, no_s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    p, m, alpha = _softmax(
        s, m, (num_tiles - 1) * keys, last, t, num_queries, maxima_ptr, maxima_stride_n, num_blocks,
        scale, True, BLOCK, MAXIMA,
    )  # fmt: skip
    total = gl.sum(p, axis=1)
    weights = gl.convert_layout(p.to(dtype), p_layout)

    for part in gl.static_range(2):
        begin = 1 if part == 0 else gl.maximum(1, num_masked)
        end = gl.maximum(1, num_masked) if part == 0 else num_tiles
        for i in range(begin, end):
            k_stage = i % stages
            v_stage = (i - 1) % stages
            mbarrier.wait(k_ready.index(k_stage), (i // stages) & 1)
            k = k_smem.index(k_stage).reshape([keys, dim]).permute((1, 0))
            s = warpgroup_mma(q, k, no_s, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(v_stage), ((i - 1) // stages) & 1)
            v = v_smem.index(v_stage).reshape([keys, dim])
            acc = warpgroup_mma(weights, v, acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(k_free.index(k_stage))
            p, m, alpha = _softmax(
                s, m, (num_tiles - 1 - i) * keys, last, t, num_queries, maxima_ptr, maxima_stride_n,
                num_blocks, scale, part == 0, BLOCK, MAXIMA,
            )  # fmt: skip
            total = total * alpha + gl.sum(p, axis=1)
            weights_next = gl.convert_layout(p.to(dtype), p_layout)
            # A wait that is over at once: ptxas moves nothing across it, so that the softmax stays
            # before the wait for p v, beside which it shall run.
            mbarrier.wait(v_ready.index(v_stage), ((i - 1) // stages) & 1)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights_next])
            mbarrier.arrive(v_free.index(v_stage))
            acc *= gl.convert_layout(alpha, out_row_layout, assert_trivial=True)[:, None]

    stage = (num_tiles - 1) % stages
    mbarrier.wait(v_ready.index(stage), ((num_tiles - 1) // stages) & 1)
    acc = warpgroup_mma(weights, v_smem.index(stage).reshape([keys, dim]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    of_keys = m * (scale * LOG2_E)
    peak = of_keys
    shrink = gl.full([rows], 1.0, gl.float32, row_layout)
    if SINKS:
        sink = gl.load(sinks_ptr + h).to(gl.float32) * LOG2_E
        peak = gl.maximum(of_keys, sink)
        shrink = gl.exp2(of_keys - peak)
        total = total * shrink + gl.exp2(sink - peak)
    at = t.to(gl.int64) * lse_stride_t
    log_total = gl.log2(total)
    gl.store(lse_ptr + at, (peak + log_total) * LN_2, mask=t < num_queries)
    if MAXIMA:
        # The weights are of m times the factor unrounded (a fused multiply-add), so is the total.
        unrounded = gl.fma(m, gl.full([rows], scale * LOG2_E, gl.float32, row_layout), -of_keys)
        log_total = (peak - of_keys + log_total - unrounded) * LN_2
        gl.store(peaks_ptr + at, m * scale, mask=t < num_queries)
        gl.store(totals_ptr + at, log_total, mask=t < num_queries)
    shrink = gl.convert_layout(shrink / total, out_row_layout, assert_trivial=True)
    out = gl.convert_layout(
        (acc * shrink[:, None]).to(dtype), gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    )
    out_smem = q_smem.index(HALF)
    out_smem.reshape([rows, dim]).store(out)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [b, h, row + HALF * rows, 0], out_smem)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "num_queries",
        "num_blocks",
        "diagonal",
        "batch",
        "maxima_stride_n",
        "maxima_stride_h",
    ]
)
def _kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, lse_stride_b, lse_stride_t, maxima_ptr,
    maxima_stride_h, maxima_stride_n, peaks_ptr, totals_ptr, sinks_ptr, num_queries, num_blocks,
    diagonal, batch, scale, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, MAXIMA: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    rows: gl.constexpr = q_desc.block_type.shape[2]
    keys: gl.constexpr = k_desc.block_type.shape[2]
    dim: gl.constexpr = q_desc.block_type.shape[3]
    dtype: gl.constexpr = q_desc.dtype
    pid = gl.program_id(0)
    row = (gl.num_programs(0) // (batch * HEADS) - 1 - pid // (batch * HEADS)) * (2 * rows)
    h = pid % HEADS
    b = (pid // HEADS) % batch
    g = h // (HEADS // KV_HEADS)
    last_row = gl.minimum(row + 2 * rows, num_queries) - 1
    num_tiles = (diagonal + last_row) // keys + 1
    num_masked = num_tiles - (diagonal + row + 1) // keys
    of_head = b.to(gl.int64) * lse_stride_b + h
    lse_ptr += of_head
    peaks_ptr += of_head
    totals_ptr += of_head
    maxima_ptr += (b * HEADS + h).to(gl.int64) * maxima_stride_h

    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, rows, dim], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, keys, dim], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, keys, dim], v_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (
                _attend,
                (
                    q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free, out_desc,
                    lse_ptr, lse_stride_t, maxima_ptr, maxima_stride_n, peaks_ptr, totals_ptr,
                    sinks_ptr, b, h, row, num_queries, num_blocks, num_tiles, num_masked, diagonal,
                    scale,
                    0, BLOCK, MAXIMA, SINKS,
                ),
            ),
            (
                _attend,
                (
                    q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free, out_desc,
                    lse_ptr, lse_stride_t, maxima_ptr, maxima_stride_n, peaks_ptr, totals_ptr,
                    sinks_ptr, b, h, row, num_queries, num_blocks, num_tiles, num_masked, diagonal,
                    scale,
                    1, BLOCK, MAXIMA, SINKS,
                ),
            ),
            (
                _load,
                (
                    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_free,
                    v_ready, v_free, b, h, g, row, num_tiles,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def takes(
    q: Tensor, k: Tensor, v: Tensor, key_range: KeyRange, *, scale: float, softcap: float | None
) -> bool:
    """Whether this kernel runs the call: plain causal attention on Hopper, at its head dims."""
    known = key_range.diagonal is not None and key_range.diagonal >= 0
    return known and suits(q, k, v, scale=scale, softcap=softcap)


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
    softcap: None,
    block_size: int,
) -> None:
    """As ``forward.full_forward``, for the calls that ``takes`` takes."""
    B, T, H, D = q.shape
    assert key_range.diagonal is not None
    if 0 in (B, T):
        return
    has_maxima, dtype = maxima is not None, DTYPES[q.dtype]

    def described(x: Tensor, rows: int) -> TensorDescriptor:
        block = [1, 1, rows, D]
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        return TensorDescriptor.from_tensor(x.transpose(1, 2), block, layout)

    _kernel[(-(-T // TILE_ROWS) * H * B,)](
        described(q, GROUP_ROWS),
        described(k, TILE_KEYS),
        described(v, TILE_KEYS),
        described(out, GROUP_ROWS),
        lse,
        lse.stride(0),
        lse.stride(1),
        *(
            (lse, 0, 0, lse, lse)
            if maxima is None
            else (maxima.blocks, *maxima.blocks.stride()[1:3], maxima.peaks, maxima.totals)
        ),
        lse if sinks is None else sinks,
        T,
        maxima.blocks.shape[2] if maxima is not None else 0,
        key_range.diagonal,
        B,
        scale,
        HEADS=H,
        KV_HEADS=k.shape[2],
        BLOCK=block_size,
        STAGES=STAGES,
        MAXIMA=has_maxima,
        SINKS=sinks is not None,
        num_warps=4,
    )
