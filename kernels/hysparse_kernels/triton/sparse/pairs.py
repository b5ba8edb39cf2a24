"""Pairs of a query and a key block it chose, listed by key block.

Lists are cut into items of at most ``item`` pairs of one key block: what a program takes at a time.
Pairs of rare blocks get a place in a workspace, where partial results go; where they are too many
for it they go in several passes, each over the tiles whose pairs fit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.triton.sparse.query_tiles import QueryTiles, popcount

ITEM_OF_RARE, ITEM_OF_ALL = 128, 512


class Pairs(NamedTuple):
    """Pairs (query, key block), by pass, then (b, g), then key block.

    queries: (P,) int32, the query t of each pair. places: (P,) int32, its place in the workspace
        of its pass, a query's places adjacent; None where all blocks are listed.
    ends: (passes * B * G * bins,) int64, where each block's pairs end. item_ends: where its
        items end. A bin is a block, or a key slot where blocks may start anywhere.
    item_bins: (I,) int32, item_begins: (I,) int64: an item's bin and first pair.
    tile_ends: (B, G, tiles) int64, where each tile's pairs end, counted by tile.
    query_begins, query_counts: (B, G, tiles, queries) int32, each query's first place, counted
        from its tile's, and how many; None where all blocks are listed.
    slots_per_bin: block size, or 1. at_once: pairs of a pass, but for its last tile. item: pairs.
    """

    queries: Tensor
    places: Tensor | None
    ends: Tensor
    item_ends: Tensor
    item_bins: Tensor
    item_begins: Tensor
    tile_ends: Tensor
    query_begins: Tensor | None
    query_counts: Tensor | None
    bins: int
    slots_per_bin: int
    at_once: int
    passes: int
    item: int


def pairs_of(
    tiles: QueryTiles,
    *,
    num_queries: int,
    num_keys: int,
    block_size: int,
    aligned: bool,
    at_once: int | None,
) -> Pairs:
    """List the pairs of the tiles' rare blocks, or of all blocks where ``at_once`` is None.

    Args:
        num_queries, num_keys: T, S.
        aligned: whether every block starts at a multiple of ``block_size``.
        at_once: how many pairs a pass may hold.
    """
    B, G, num_tiles, capacity = tiles.starts.shape
    rare = at_once is not None
    most = B * num_queries * G * (capacity // tiles.queries)
    passes = max(1, triton.cdiv(most, at_once)) if at_once is not None else 1
    slots_per_bin = block_size if aligned else 1
    bins = triton.cdiv(num_keys, slots_per_bin)
    all_bins = passes * B * G * bins
    item = ITEM_OF_RARE if rare else ITEM_OF_ALL
    most_items = most // item + min(most, all_bins)

    like = tiles.starts
    bin_counts = like.new_zeros(all_bins)
    within = torch.empty_like(like)
    tile_ends = tiles.pairs.flatten().cumsum(0).view_as(tiles.pairs)
    queries = like.new_empty(most)
    places = like.new_empty(most) if rare else None
    begins = like.new_empty(*tiles.counts.shape, tiles.queries) if rare else None
    counts = torch.empty_like(begins) if begins is not None else None
    item_bins = like.new_empty(most_items)
    item_begins = like.new_empty(most_items, dtype=torch.int64)
    grid, entries = (B * G * num_tiles,), triton.next_power_of_2(capacity)
    num_warps = min(8, max(1, entries // 256))
    shared = (tiles.starts, tiles.members, tiles.counts, tiles.rare, tiles.pairs, tile_ends)
    sizes = {
        "CAPACITY": capacity,
        "ENTRIES": entries,
        "SLOTS_PER_BIN": slots_per_bin,
        "RARE": rare,
    }
    _count[grid](
        *shared,
        within,
        bin_counts,
        num_tiles,
        B * G,
        bins,
        at_once or 1,
        **sizes,
        num_warps=num_warps,
    )
    ends = bin_counts.cumsum(0)
    item_ends = ((bin_counts + (item - 1)) // item).cumsum(0)
    _scatter[grid](
        *shared,
        within,
        bin_counts,
        ends,
        item_ends,
        queries,
        places,
        begins,
        counts,
        item_bins,
        item_begins,
        num_tiles,
        B * G,
        bins,
        at_once or 1,
        **sizes,
        QUERIES=tiles.queries,
        ITEM=item,
        num_warps=num_warps,
    )
    return Pairs(
        queries,
        places,
        ends,
        item_ends,
        item_bins,
        item_begins,
        tile_ends,
        begins,
        counts,
        bins,
        slots_per_bin,
        at_once or 1,
        passes,
        item,
    )


@triton.jit
def _entries_of(
    pid,
    starts,
    members,
    common,
    rare,
    CAPACITY: tl.constexpr,
    ENTRIES: tl.constexpr,
    RARE: tl.constexpr,
):
    """A tile's rare entries, or all: where they lie, which are there, their slots and members."""
    skipped = tl.load(common + pid)
    count = tl.load(rare + pid)
    if not RARE:
        count += skipped
        skipped = 0
    entry = tl.arange(0, ENTRIES)
    there = entry < count
    at = pid * CAPACITY + skipped + entry
    return (
        at,
        there,
        tl.load(starts + at, mask=there, other=0),
        tl.load(members + at, mask=there, other=0),
    )


@triton.jit
def pass_of(pid, pairs, tile_ends, at_once):
    """The pass of a tile, and its first pair's place there."""
    begin = tl.load(tile_ends + pid) - tl.load(pairs + pid)
    return begin // at_once, begin % at_once


@triton.jit(do_not_specialize=["num_tiles", "num_lists", "bins", "at_once"])
def _count(
    starts,
    members,
    common,
    rare,
    pairs,
    tile_ends,
    within,
    bin_counts,
    num_tiles,
    num_lists,
    bins,
    at_once,
    CAPACITY: tl.constexpr,
    ENTRIES: tl.constexpr,
    SLOTS_PER_BIN: tl.constexpr,
    RARE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    at, there, slot, chosen_by = _entries_of(
        pid, starts, members, common, rare, CAPACITY, ENTRIES, RARE
    )
    turn = pid * 0
    if RARE:
        turn, _ = pass_of(pid, pairs, tile_ends, at_once)
    bin = (turn * num_lists + pid // num_tiles) * bins + slot // SLOTS_PER_BIN
    offset = tl.atomic_add(bin_counts + bin, popcount(chosen_by), mask=there, sem="relaxed")
    tl.store(within + at, offset, mask=there)


@triton.jit(do_not_specialize=["num_tiles", "num_lists", "bins", "at_once"])
def _scatter(
    starts,
    members,
    common,
    rare,
    pairs,
    tile_ends,
    within,
    bin_counts,
    ends,
    item_ends,
    queries,
    places,
    query_begins,
    query_counts,
    item_bins,
    item_begins,
    num_tiles,
    num_lists,
    bins,
    at_once,
    CAPACITY: tl.constexpr,
    ENTRIES: tl.constexpr,
    SLOTS_PER_BIN: tl.constexpr,
    RARE: tl.constexpr,
    QUERIES: tl.constexpr,
    ITEM: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    at, there, slot, chosen_by = _entries_of(
        pid, starts, members, common, rare, CAPACITY, ENTRIES, RARE
    )
    turn = pid * 0
    place = pid * 0
    if RARE:
        turn, place = pass_of(pid, pairs, tile_ends, at_once)
    bin = (turn * num_lists + pid // num_tiles) * bins + slot // SLOTS_PER_BIN
    size = tl.load(bin_counts + bin, mask=there, other=0)
    begin = tl.load(ends + bin, mask=there, other=0) - size
    item = tl.load(item_ends + bin, mask=there, other=0) - (size + ITEM - 1) // ITEM
    offset = tl.load(within + at, mask=there, other=0)
    t = pid % num_tiles * QUERIES
    base = place
    for i in range(QUERIES):
        chose = (chosen_by >> i) & 1
        has = chose != 0
        tl.store(queries + begin + offset, (t + i).to(tl.int32), mask=has)
        if RARE:
            rank = tl.cumsum(chose) - chose
            tl.store(places + begin + offset, (place + rank).to(tl.int32), mask=has)
            count = tl.sum(chose)
            tl.store(query_begins + pid * QUERIES + i, (place - base).to(tl.int32))
            tl.store(query_counts + pid * QUERIES + i, count)
            place += count
        opens = has & (offset % ITEM == 0)
        tl.store(item_bins + item + offset // ITEM, bin.to(tl.int32), mask=opens)
        tl.store(item_begins + item + offset // ITEM, begin + offset, mask=opens)
        offset += chose
