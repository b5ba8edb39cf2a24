"""Block-sparse attention for Hopper: two warpgroups share the key blocks that a warp loads.

A tile is 128 rows: neighbouring queries times the query heads of a KV head. It goes through the
union of its queries' lists; a row counts in a block where its query chose the block.
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
from hysparse_kernels.triton.hopper import (
    DTYPES,
    LN_2,
    LOG2_E,
    STAGES,
    TILE_KEYS,
    TILE_ROWS,
    suits,
)
from hysparse_kernels.triton.sparse.query_tiles import QueryTiles


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free,
    starts, b, g, t, count, num_steps, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp's work: q once, then the blocks of the union, the last first."""
    queries: gl.constexpr = q_desc.block_type.shape[1]
    group: gl.constexpr = q_desc.block_type.shape[2]
    block: gl.constexpr = k_desc.block_type.shape[2]
    width: gl.constexpr = k_desc.block_type.shape[3]
    chunks: gl.constexpr = q_smem.type.shape[0] // 2
    blocks: gl.constexpr = k_smem.type.shape[3] // block
    for half in gl.static_range(2):
        mbarrier.expect(q_ready.index(half), chunks * q_desc.block_type.nbytes)
        for c in gl.static_range(chunks):
            tma.async_copy_global_to_shared(
                q_desc, [b, t + half * queries, g * group, c * width], q_ready.index(half),
                q_smem.index(half * chunks + c),
            )  # fmt: skip
    for i in range(num_steps):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_ready.index(stage), chunks * blocks * k_desc.block_type.nbytes)
        for j in gl.static_range(blocks):
            entry = count - 1 - i * blocks - j
            slot = gl.load(starts + entry, mask=entry >= 0, other=0)
            for c in gl.static_range(chunks):
                to = k_smem.index(stage * chunks + c).slice(j * block, block, dim=2)
                at = [b, g, slot, c * width]
                tma.async_copy_global_to_shared(k_desc, at, k_ready.index(stage), to)
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_ready.index(stage), chunks * blocks * v_desc.block_type.nbytes)
        for j in gl.static_range(blocks):
            entry = count - 1 - i * blocks - j
            slot = gl.load(starts + entry, mask=entry >= 0, other=0)
            for c in gl.static_range(chunks):
                to = v_smem.index(stage * chunks + c).slice(j * block, block, dim=2)
                at = [b, g, slot, c * width]
                tma.async_copy_global_to_shared(v_desc, at, v_ready.index(stage), to)


@gluon.jit
def _multiply_keys(q_smem, k_smem, q_first, k_first, s, chunks: gl.constexpr):
    """q k^T of one step, begun."""
    rows: gl.constexpr = s.shape[0]
    keys: gl.constexpr = s.shape[1]
    width: gl.constexpr = k_smem.type.shape[4]
    for c in gl.static_range(chunks):
        q = q_smem.index(q_first + c).reshape([rows, width])
        k = k_smem.index(k_first + c).reshape([keys, width]).permute((1, 0))
        s = warpgroup_mma(q, k, s, use_acc=c > 0, is_async=True)
    return s


@gluon.jit
def _softmax(
    s, m, starts, entry, chosen_by, query, last, scale, MASKED: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """A step's exponentials, the running maximum after it, and what to scale the past by."""
    rows: gl.constexpr = s.shape[0]
    keys: gl.constexpr = s.shape[1]
    blocks: gl.constexpr = keys // BLOCK
    row_layout: gl.constexpr = m.type.layout
    s_layout: gl.constexpr = s.type.layout
    s = gl.reshape(s, [rows, blocks, BLOCK])
    tops_layout: gl.constexpr = gl.SliceLayout(2, s.type.layout)
    of_row: gl.constexpr = gl.SliceLayout(1, tops_layout)
    query = gl.convert_layout(query, of_row, assert_trivial=True)
    chosen = ((chosen_by[None, :] >> query[:, None]) & 1) != 0
    if MASKED:
        slot = gl.load(starts + entry, mask=entry >= 0, other=0)
        column = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(0, s.type.layout)))
        slots = gl.expand_dims(slot[None, :], 2) + gl.expand_dims(column[None, :], 0)
        end = gl.convert_layout(last, of_row, assert_trivial=True)
        s = gl.where(slots <= gl.expand_dims(end[:, None], 2), s, float("-inf"))
    tops = gl.where(chosen, gl.max(s, axis=2), float("-inf"))
    top = gl.convert_layout(gl.max(tops, axis=1), row_layout, assert_trivial=True)
    m_next = gl.maximum(m, top)
    pivot = gl.where(m_next == float("-inf"), 0.0, m_next)
    alpha = gl.exp2((m - pivot) * (scale * LOG2_E))  # exactly 1 where the maximum stays
    pivot *= scale * LOG2_E
    # A row that did not choose the block: exp2(-inf) = 0.
    of_tops = gl.convert_layout(pivot, of_row, assert_trivial=True)[:, None]
    of_tops = gl.where(chosen, of_tops, float("inf"))
    p = gl.exp2(s * (scale * LOG2_E) - gl.expand_dims(of_tops, 2))
    p = gl.convert_layout(gl.reshape(p, [rows, keys]), s_layout, assert_trivial=True)
    return p, m_next, alpha


@gluon.jit
def _attend(
    q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free, out_desc, lse_ptr, first_ptr,
    first_stride, last_ptr, last_stride, sinks_ptr, starts, members, b, g, t, num_queries, count,
    num_steps, scale,
    HALF: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    FIRST: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """One warpgroup's work: half of the tile's rows over all steps."""
    dtype: gl.constexpr = q_smem.dtype
    queries: gl.constexpr = q_smem.type.shape[2]
    group: gl.constexpr = q_smem.type.shape[3]
    width: gl.constexpr = q_smem.type.shape[4]
    rows: gl.constexpr = queries * group
    chunks: gl.constexpr = q_smem.type.shape[0] // 2
    keys: gl.constexpr = k_smem.type.shape[3]
    blocks: gl.constexpr = keys // BLOCK
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)

    row = gl.arange(0, rows, row_layout)
    query = HALF * queries + row // group
    real = t + query < num_queries
    last = gl.load(last_ptr + (t + query) * last_stride, mask=real, other=-1).to(gl.int32)
    # Only the newest blocks reach beyond a query, if all queries count their blocks alike.
    steps_masked: gl.constexpr = ((2 * queries + BLOCK - 2) // BLOCK + blocks) // blocks
    num_masked = gl.minimum(steps_masked, num_steps)
    if FIRST:
        first = gl.load(first_ptr + (t + query) * first_stride, mask=real, other=-1).to(gl.int32)
        if gl.max(first, axis=0) != gl.min(gl.where(real, first, 2**31 - 1), axis=0):
            num_masked = num_steps

    m = gl.full([rows], float("-inf"), gl.float32, row_layout)
    acc_0 = gl.zeros([rows, width], gl.float32, o_layout)
    acc_1 = acc_0
    no_s = gl.zeros([rows, keys], gl.float32, s_layout)
    by_block = gl.reshape(no_s, [rows, blocks, BLOCK])
    of_block: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, by_block.type.layout))
    entry = count - 1 - gl.arange(0, blocks, of_block)
    chosen_by = gl.load(members + entry, mask=entry >= 0, other=0)

    mbarrier.wait(q_ready.index(HALF), 0)
    mbarrier.wait(k_ready.index(0), 0)
    s = _multiply_keys(q_smem, k_smem, HALF * chunks, 0, no_s, chunks)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    p, m, alpha = _softmax(s, m, starts, entry, chosen_by, query, last, scale, True, BLOCK)
    total = gl.sum(p, axis=1)
    weights = gl.convert_layout(p.to(dtype), p_layout, assert_trivial=True)

    for part in gl.static_range(2):
        begin = 1 if part == 0 else gl.maximum(1, num_masked)
        end = gl.maximum(1, num_masked) if part == 0 else num_steps
        for i in range(begin, end):
            k_stage = i % STAGES
            v_stage = (i - 1) % STAGES
            v_phase = ((i - 1) // STAGES) & 1
            entry -= blocks
            chosen_by = gl.load(members + entry, mask=entry >= 0, other=0)
            mbarrier.wait(k_ready.index(k_stage), (i // STAGES) & 1)
            s = _multiply_keys(q_smem, k_smem, HALF * chunks, k_stage * chunks, no_s, chunks)
            mbarrier.wait(v_ready.index(v_stage), v_phase)
            v = v_smem.index(v_stage * chunks).reshape([keys, width])
            acc_0 = warpgroup_mma(weights, v, acc_0, is_async=True)
            if chunks == 2:
                v = v_smem.index(v_stage * chunks + 1).reshape([keys, width])
                acc_1 = warpgroup_mma(weights, v, acc_1, is_async=True)
            s = warpgroup_mma_wait(chunks, deps=[s])
            mbarrier.arrive(k_free.index(k_stage))
            p, m, alpha = _softmax(
                s, m, starts, entry, chosen_by, query, last, scale, part == 0, BLOCK
            )
            total = total * alpha + gl.sum(p, axis=1)
            next_weights = gl.convert_layout(p.to(dtype), p_layout, assert_trivial=True)
            # A wait that is over at once: ptxas moves nothing across it, so that the softmax stays
            # before the wait for p v, beside which it shall run.
            mbarrier.wait(v_ready.index(v_stage), v_phase)
            shrink = gl.convert_layout(alpha, out_row_layout, assert_trivial=True)[:, None]
            if chunks == 2:
                acc_0, acc_1, weights = warpgroup_mma_wait(0, deps=[acc_0, acc_1, next_weights])
                acc_1 *= shrink
            else:
                acc_0, weights = warpgroup_mma_wait(0, deps=[acc_0, next_weights])
            mbarrier.arrive(v_free.index(v_stage))
            acc_0 *= shrink

    stage = (num_steps - 1) % STAGES
    mbarrier.wait(v_ready.index(stage), ((num_steps - 1) // STAGES) & 1)
    v = v_smem.index(stage * chunks).reshape([keys, width])
    acc_0 = warpgroup_mma(weights, v, acc_0, is_async=True)
    if chunks == 2:
        v = v_smem.index(stage * chunks + 1).reshape([keys, width])
        acc_1 = warpgroup_mma(weights, v, acc_1, is_async=True)
        acc_0, acc_1 = warpgroup_mma_wait(0, deps=[acc_0, acc_1])
    else:
        acc_0 = warpgroup_mma_wait(0, deps=[acc_0])

    peak = m * (scale * LOG2_E)
    shrink = gl.full([rows], 1.0, gl.float32, row_layout)
    h = g * group + row % group
    if SINKS:
        sink = gl.load(sinks_ptr + h).to(gl.float32) * LOG2_E
        higher = gl.maximum(peak, sink)
        shrink = gl.exp2(peak - higher)
        total = total * shrink + gl.exp2(sink - higher)
        peak = higher
    where = lse_ptr + (t + query).to(gl.int64) * HEADS + h
    gl.store(where, (peak + gl.log2(total)) * LN_2, mask=real)
    shrink = shrink / gl.where(total == 0, 1.0, total)
    shrink = gl.convert_layout(shrink, out_row_layout, assert_trivial=True)[:, None]
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for c in gl.static_range(chunks):
        acc = acc_0 if c == 0 else acc_1
        to = q_smem.index(HALF * chunks + c)
        to.reshape([rows, width]).store(gl.convert_layout((acc * shrink).to(dtype), store_layout))
        fence_async_shared()
        at = [b, t + HALF * queries, g * group, c * width]
        tma.async_copy_shared_to_global(out_desc, at, to)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "num_tiles", "first_stride_b", "last_stride_b"])
def _kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, first_ptr, first_stride_b, first_stride, last_ptr,
    last_stride_b, last_stride, sinks_ptr, starts, members, counts, num_queries, num_tiles, scale,
    HEADS: gl.constexpr, CAPACITY: gl.constexpr, TILE_KEYS: gl.constexpr, STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, FIRST: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    queries: gl.constexpr = q_desc.block_type.shape[1]
    group: gl.constexpr = q_desc.block_type.shape[2]
    width: gl.constexpr = q_desc.block_type.shape[3]
    block: gl.constexpr = k_desc.block_type.shape[2]
    blocks: gl.constexpr = TILE_KEYS // block
    kv_heads: gl.constexpr = HEADS // group
    dtype: gl.constexpr = q_desc.dtype
    pid = gl.program_id(0)
    tile = num_tiles - 1 - pid // kv_heads % num_tiles
    g = pid % kv_heads
    b = pid // kv_heads // num_tiles
    t = tile * (2 * queries)
    index = (b * kv_heads + g).to(gl.int64) * num_tiles + tile
    count = gl.load(counts + index)
    num_steps = gl.maximum(1, (count + blocks - 1) // blocks)
    starts += index * CAPACITY
    members += index * CAPACITY
    lse_ptr += b.to(gl.int64) * num_queries * HEADS
    first_ptr += b.to(gl.int64) * first_stride_b
    last_ptr += b.to(gl.int64) * last_stride_b

    q_smem = gl.allocate_shared_memory(dtype, [2 * CHUNKS, 1, queries, group, width], q_desc.layout)
    k_smem = gl.allocate_shared_memory(
        dtype, [STAGES * CHUNKS, 1, 1, TILE_KEYS, width], k_desc.layout
    )
    v_smem = gl.allocate_shared_memory(
        dtype, [STAGES * CHUNKS, 1, 1, TILE_KEYS, width], v_desc.layout
    )
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
                    lse_ptr, first_ptr, first_stride, last_ptr, last_stride, sinks_ptr, starts,
                    members, b, g, t, num_queries, count, num_steps, scale,
                    0, HEADS, block, STAGES, FIRST, SINKS,
                ),
            ),
            (
                _attend,
                (
                    q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free, out_desc,
                    lse_ptr, first_ptr, first_stride, last_ptr, last_stride, sinks_ptr, starts,
                    members, b, g, t, num_queries, count, num_steps, scale,
                    1, HEADS, block, STAGES, FIRST, SINKS,
                ),
            ),
            (
                _load,
                (
                    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_free,
                    v_ready, v_free, starts, b, g, t, count, num_steps, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def takes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    *,
    block_size: int,
    scale: float,
    softcap: float | None,
) -> bool:
    """Whether this kernel runs the call: on Hopper, no mask with holes, at its sizes."""
    group = q.shape[2] // k.shape[2]
    tiled = group in GROUPS and TILE_KEYS % block_size == 0
    return tiled and key_range.mask is None and suits(q, k, v, scale=scale, softcap=softcap)


GROUPS = (4, 8, 16, 32, 64)


def sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: QueryTiles,
    key_range: KeyRange,
    out: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    scale: float,
    sinks: Tensor | None,
) -> None:
    """Attend the tiles' queries to the blocks they chose, for the calls that ``takes`` takes.

    Args:
        q: (B, T, H, D). k, v: (B, S, G, D). tiles: of TILE_ROWS // (H // G) queries each.
        out: (B, T, H, D) and lse: (B, T, H) float32, contiguous, written.
    """
    B, T, H, D = q.shape
    group = H // k.shape[2]
    dtype, width = DTYPES[q.dtype], 64
    assert tiles.queries * group == TILE_ROWS

    def described(x: Tensor, block: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        return TensorDescriptor.from_tensor(x, block, layout)

    rows, keys = [1, tiles.queries // 2, group, width], [1, 1, block_size, width]
    first, last, num_tiles = key_range.first, key_range.last, tiles.counts.shape[2]
    _kernel[(num_tiles * k.shape[2] * B,)](
        described(q, rows),
        described(k.transpose(1, 2), keys),
        described(v.transpose(1, 2), keys),
        described(out, rows),
        lse,
        last if first is None else first,
        0 if first is None or first.shape[0] == 1 else first.stride(0),
        0 if first is None else first.stride(1),
        last,
        0 if last.shape[0] == 1 else last.stride(0),
        last.stride(1),
        lse if sinks is None else sinks,
        tiles.starts,
        tiles.members,
        tiles.counts,
        T,
        num_tiles,
        scale,
        HEADS=H,
        CAPACITY=tiles.starts.shape[3],
        TILE_KEYS=TILE_KEYS,
        STAGES=STAGES,
        CHUNKS=D // width,
        FIRST=first is not None,
        SINKS=sinks is not None,
        num_warps=4,
    )
