"""Which blocks are selected from where, as pictures: rows of queries by columns of keys."""

import torch
from torch import Tensor

ROWS, COLUMNS = 48, 96
SMALL_ROWS, SMALL_COLUMNS = 12, 24
SLAB_QUERIES = 1024

Map = list[list[float | None]]


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
    N = -(-T // block_size)
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
    N = -(-tokens // block_size)
    rows, columns = min(ROWS, N), min(COLUMNS, N)
    queries = torch.arange(tokens)
    row_of, sees = queries * rows // tokens, queries // block_size + 1
    before = torch.arange(N) * columns // N
    first = torch.searchsorted(before, torch.arange(columns))  # each column's first block
    width = before.bincount(minlength=columns)
    per_column = (sees[:, None] - first).clamp(min=0).minimum(width).float()
    return torch.zeros(rows, columns).index_add_(0, row_of, per_column)


def smaller(cells: Map, tokens: int, block_size: int) -> Map:
    """A map of a terminal's size: neighbouring cells of ``cells`` put together."""
    visible = visible_pairs(tokens, block_size)
    pooled = _pooled(_shares(cells).nan_to_num() * visible) / _pooled(visible)
    return _optional(pooled)


def mean_map(maps: list[Map]) -> Map:
    """Of the KV heads of a layer."""
    return _optional(torch.stack(list(map(_shares, maps))).mean(0))


def _shares(cells: Map) -> Tensor:
    """None as NaN."""
    return torch.tensor([[torch.nan if cell is None else cell for cell in row] for row in cells])


def _pooled(values: Tensor) -> Tensor:
    for dim, most in enumerate((SMALL_ROWS, SMALL_COLUMNS)):
        size = values.shape[dim]
        small = min(most, size)
        shape = (small, values.shape[1]) if dim == 0 else (values.shape[0], small)
        index = torch.arange(size) * small // size
        values = torch.zeros(shape).index_add_(dim, index, values)
    return values


def _optional(shares: Tensor) -> Map:
    """A 0 / 0 as None."""
    return [[None if cell != cell else cell for cell in row] for row in shares.tolist()]
