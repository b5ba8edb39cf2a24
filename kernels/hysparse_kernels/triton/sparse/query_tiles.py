"""Tiles of neighbouring queries: which key blocks each tile attends to, and who chose them.

Neighbours choose much the same blocks. A tile reads each block of its queries' lists once. Blocks
that few of its queries chose may be set apart as rare, to go by another way.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import strides_of

RARE = 1 / 4  # the share of a tile's queries up to which a block is rare
MOST_ENTRIES = 8192  # of the lists of a tile: what is sorted at a time


class QueryTiles(NamedTuple):
    """The union of the lists of each tile of neighbouring queries of a KV head.

    starts: (B, G, tiles, C) int32, each chosen block's first key slot, ascending; then the rare
        ones. What lies beyond is undefined.
    members: (B, G, tiles, C) int32, bit i set where the tile's i-th query chose the block.
    counts, rare: (B, G, tiles) int32, how many blocks are not rare, and how many are.
    pairs: (B, G, tiles) int32, the queries that chose each rare block, added up.
    queries: in a tile, a power of two, at most 32.
    """

    starts: Tensor
    members: Tensor
    counts: Tensor
    rare: Tensor
    pairs: Tensor
    queries: int


def query_tiles(
    block_idx: Tensor,
    key_range: KeyRange,
    *,
    block_size: int,
    num_keys: int,
    group: int,
    rows: int = 128,
    with_rare: bool = False,
) -> QueryTiles:
    """Unite the lists of neighbouring queries.

    Args:
        block_idx: (B, T, G, K) integers, distinct in a list, -1 pads anywhere.
        block_size: tokens in a key block. num_keys: S. group: query heads a KV head.
        rows: queries x query heads of a tile, as far as 32 queries and lists sorted together go.
        with_rare: whether to set rare blocks apart.
    Returns: QueryTiles; blocks wholly beyond a query's last key are left out.
    """
    B, T, G, K = block_idx.shape
    queries = queries_per_tile(group, K, rows)
    tiles = triton.cdiv(T, queries)
    starts = block_idx.new_empty(B, G, tiles, queries * K, dtype=torch.int32)
    members = torch.empty_like(starts)
    counts, rare, pairs = block_idx.new_empty(3, B, G, tiles, dtype=torch.int32)
    result = QueryTiles(starts, members, counts, rare, pairs, queries)
    if not starts.numel():
        counts.zero_()
        return result
    first, last = key_range.first, key_range.last
    padded_k = triton.next_power_of_2(K)
    _unite[(B * G * tiles,)](
        block_idx,
        *block_idx.stride(),
        first,
        *strides_of(first),
        last,
        *strides_of(last),
        starts,
        members,
        counts,
        rare,
        pairs,
        T,
        num_keys,
        G,
        K,
        BLOCK=block_size,
        QUERIES=queries,
        PADDED_K=padded_k,
        RARE=int(queries * RARE) if with_rare else 0,
        WIDE=num_keys * queries >= 1 << 31,
        num_warps=min(8, max(1, queries * padded_k // 256)),
    )
    return result


def queries_per_tile(group: int, top_k: int, rows: int) -> int:
    """How many neighbours make ``rows`` rows, as far as their lists can be sorted together."""
    queries: int = max(1, min(32, rows // triton.next_power_of_2(group)))
    while queries > 1 and queries * triton.next_power_of_2(max(1, top_k)) > MOST_ENTRIES:
        queries //= 2
    return queries


@triton.jit(do_not_specialize=["T", "S", "stride_ib", "stride_fb", "stride_lb"])
def _unite(
    block_idx,
    stride_ib,
    stride_it,
    stride_ig,
    stride_ik,
    first,
    stride_fb,
    stride_ft,
    last,
    stride_lb,
    stride_lt,
    starts,
    members,
    counts,
    rare,
    pairs,
    T,
    S,
    G,
    K,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED_K: tl.constexpr,
    RARE: tl.constexpr,
    WIDE: tl.constexpr,
):
    ENTRIES: tl.constexpr = QUERIES * PADDED_K
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(T, QUERIES)
    tile, g, b = pid % tiles, pid // tiles % G, pid // tiles // G

    entry = tl.arange(0, ENTRIES)
    query, rank = entry // PADDED_K, entry % PADDED_K
    t = tile * QUERIES + query
    given = (t < T) & (rank < K)
    at = b * stride_ib + t * stride_it + g * stride_ig + rank * stride_ik
    block = tl.load(block_idx + at, mask=given, other=-1).to(tl.int64)
    start = block * BLOCK
    if first is not None:
        own = tl.load(first + b * stride_fb + t * stride_ft, mask=given, other=0)
        start += tl.maximum(own, 0)
    end = tl.load(last + b * stride_lb + t * stride_lt, mask=given, other=-1)
    end = tl.minimum(end, S - 1)
    given &= (block >= 0) & (start <= end)

    # By slot, then query; what is not given goes last.
    key = start * QUERIES + query
    NONE: tl.constexpr = 2**63 - 1 if WIDE else 2**31 - 1
    if not WIDE:
        key = key.to(tl.int32)
    key = tl.sort(tl.where(given, key, NONE))
    given = key != NONE
    slot = key // QUERIES
    before = tl.gather(slot, tl.maximum(entry - 1, 0), 0)
    after = tl.gather(slot, tl.minimum(entry + 1, ENTRIES - 1), 0)
    opens = given & ((entry == 0) | (slot != before))
    closes = given & ((entry == ENTRIES - 1) | (slot != after))
    chosen_by = tl.where(given, 1, 0) << (key % QUERIES).to(tl.int32)
    _, chosen_by = tl.associative_scan((opens.to(tl.int32), chosen_by), 0, _or_since)

    size = tl.where(closes, popcount(chosen_by), 0)
    is_rare = (size > 0) & (size <= RARE)
    is_common = size > RARE
    commons = tl.sum(is_common.to(tl.int32))
    place = tl.cumsum(is_common.to(tl.int32)) - 1
    if RARE > 0:
        place = tl.where(is_rare, commons + tl.cumsum(is_rare.to(tl.int32)) - 1, place)
    place += pid * QUERIES * K
    tl.store(starts + place, slot.to(tl.int32), mask=closes)
    tl.store(members + place, chosen_by, mask=closes)
    tl.store(counts + pid, commons)
    tl.store(rare + pid, tl.sum(is_rare.to(tl.int32)))
    tl.store(pairs + pid, tl.sum(tl.where(is_rare, size, 0)))


@triton.jit
def _or_since(opens_a, bits_a, opens_b, bits_b):
    """Bits collected since the last element that opens a run."""
    return opens_a | opens_b, tl.where(opens_b != 0, bits_b, bits_a | bits_b)


@triton.jit
def popcount(bits):
    """How many bits of each int32 are set."""
    x = bits.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)
