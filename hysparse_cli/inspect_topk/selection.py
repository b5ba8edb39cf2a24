"""Describes a layer's selection: pictures of it, what the next tokens keep, how far it reaches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hysparse_cli.inspect_topk.blocks import Sizes, num_blocks

ROWS, COLUMNS = 48, 96
SLAB_QUERIES = 1024
LAGS = (1, 4, 16, 64, 256)

Map = list[list[float | None]]


@dataclass(frozen=True)
class Movement:
    """One KV head's selection, over the queries that see more blocks than are kept.

    kept: for each of LAGS, the part of a token's blocks that the token so many before had selected
    too; None where no token has one so far before it. kept_random: of as many random blocks.
    distances: what part of the selected blocks is so many blocks before the query's own: 0, 1, 2-3,
    4-7 and so on, up to the longest there is. distances_random: of random blocks.
    """

    kept: list[float | None]
    kept_random: list[float | None]
    distances: list[float]
    distances_random: list[float]


def selection_maps(selection: Tensor, block_size: int) -> list[Map]:
    """One map for each KV head: [row][column], the part of (query, visible block) pairs selected.

    Rows cut the queries into equal parts, columns the blocks; None where no query of the row sees a
    block of the column.

    Args:
        selection: (T, G, K) block indices, -1 pads.
    """
    T, G, _ = selection.shape
    visible = visible_pairs(T, block_size)
    rows, columns = visible.shape
    N = num_blocks(T, block_size)
    selected = torch.zeros(G, rows, columns + 1)
    column_of = torch.arange(N) * columns // N
    for begin in range(0, T, SLAB_QUERIES):
        idx = selection[begin : begin + SLAB_QUERIES].long().cpu()
        row_of = torch.arange(begin, begin + len(idx)) * rows // T
        column = torch.where(idx < 0, columns, column_of[idx.clamp(min=0)])  # [t, G, K]
        cell = (row_of[:, None, None] * (columns + 1) + column).transpose(0, 1).flatten(1)
        for head in range(G):
            counts = cell[head].bincount(minlength=rows * (columns + 1))
            selected[head] += counts.view(rows, columns + 1)
    return [_optional(head[:, :columns] / visible) for head in selected]


def visible_pairs(tokens: int, block_size: int) -> Tensor:
    """(rows, columns): how many pairs of a query and a block it sees are in each cell of a map."""
    N = num_blocks(tokens, block_size)
    rows, columns = min(ROWS, N), min(COLUMNS, N)
    queries = torch.arange(tokens)
    row_of, sees = queries * rows // tokens, queries // block_size + 1
    before = torch.arange(N) * columns // N
    first = torch.searchsorted(before, torch.arange(columns))  # each column's first block
    width = before.bincount(minlength=columns)
    per_column = (sees[:, None] - first).clamp(min=0).minimum(width).float()
    return torch.zeros(rows, columns).index_add_(0, row_of, per_column)


def movements(selection: Tensor, sizes: Sizes) -> list[Movement] | None:
    """One for each KV head; None where no query chooses.

    Args:
        selection: (T, G, K) block indices, -1 pads.
    """
    first = sizes.first_choice
    chosen = selection[first:]
    if not len(chosen):
        return None
    kept = [_kept(chosen, lag) for lag in LAGS]
    own = torch.arange(first, len(selection), device=selection.device) // sizes.block_size
    seen = own + 1
    chance = [
        float((sizes.top_k_blocks / seen[lag:]).mean()) if lag < len(seen) else None for lag in LAGS
    ]
    bins = _bin(own.max()[None]).item() + 1
    distances = _histogram(_bin(own[:, None, None] - chosen), int(bins))
    blocks = torch.arange(int(seen.max()), device=selection.device)
    back = own[:, None] - blocks
    weight = torch.where(back >= 0, 1 / seen[:, None], 0.0)
    by_bin = weight.new_zeros(int(bins)).index_add_(
        0, _bin(back.clamp(min=0)).flatten(), weight.flatten()
    )
    random = (by_bin / by_bin.sum()).tolist()
    return [
        Movement([part[head] if part else None for part in kept], chance, shares, random)
        for head, shares in enumerate(distances)
    ]


def _kept(chosen: Tensor, lag: int) -> list[float] | None:
    if lag >= len(chosen):
        return None
    now, before = chosen[lag:, :, :, None], chosen[:-lag, :, None]
    shares: list[float] = (now == before).any(-1).float().mean((0, 2)).tolist()
    return shares


def _bin(distance: Tensor) -> Tensor:
    """0, 1, 2-3, 4-7, ... as 0, 1, 2, 3, ..."""
    return torch.where(distance > 0, distance.clamp(min=1).double().log2().floor() + 1, 0).long()


def _histogram(bins_TGK: Tensor, bins: int) -> list[list[float]]:
    """Each head's share of every bin."""
    by_head = bins_TGK.transpose(0, 1).flatten(1)
    counts = torch.stack([head.bincount(minlength=bins) for head in by_head]).float()
    shares: list[list[float]] = (counts / counts.sum(1, keepdim=True)).tolist()
    return shares


def _optional(shares: Tensor) -> Map:
    """A 0 / 0 as None."""
    return [[None if cell != cell else cell for cell in row] for row in shares.tolist()]
