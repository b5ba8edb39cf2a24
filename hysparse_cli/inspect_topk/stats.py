"""Does a selection fit the layers that read it: measured a layer and a slab of queries at a time.

Shape suffixes as in hysparse_kernels.reference; t is the queries of one slab. Batch size is 1 and
every block counts from the first token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hysparse_kernels import (
    KeyRange,
    block_sparse_attention,
    full_attention,
    sliding_window_attention,
)

SLAB_QUERIES = 512
MAP_ROWS, MAP_COLUMNS = 12, 24


@dataclass(frozen=True)
class LayerInputs:
    """One layer's attention as a HySparse model's observer is told of it.

    q: (1, T, H, D). k, v: (1, T, G, D), the layer's own. block_idx: (1, T, G, K).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_range: KeyRange
    scale: float
    softcap: float | None
    block_idx: Tensor
    block_size: int
    window_tokens: int

    def slabs(self) -> Iterator[tuple[int, int]]:
        length = self.q.shape[1]
        for begin in range(0, length, SLAB_QUERIES):
            yield begin, min(begin + SLAB_QUERIES, length)


@dataclass(frozen=True)
class Fit:
    """How a selection fits one layer, means over ``queries`` that see more blocks than are kept.

    Recall is the part of the layer's own top blocks that it was given; mass, the part of the
    layer's own full attention (own queries and keys, all heads) that falls on a set of keys.
    ``own_best`` is the mass of its own top blocks, ``random`` stands for as many random blocks.
    """

    queries: int
    recall: float
    recall_by_kv_head: list[float]
    recall_random: float
    mass_selected: float
    mass_own_best: float
    mass_random: float
    mass_window: float


def fit_of(inputs: LayerInputs, seed: int) -> Fit | None:
    """The fit of ``inputs.block_idx`` to its layer; None where no query has to choose."""
    chance = torch.Generator().manual_seed(seed)
    recalls: list[Tensor] = []
    recalls_random: list[Tensor] = []
    masses: list[Tensor] = []
    for begin, end in inputs.slabs():
        kept = inputs.block_idx.shape[-1]
        visible = torch.arange(begin, end) // inputs.block_size + 1
        if not bool((chooses := visible > kept).any()):
            continue
        begin += int(chooses.nonzero()[0])
        random = _random_blocks(visible[chooses], inputs.k.shape[2], kept, chance)
        own, mass = _slab_masses(inputs, begin, end, random.to(inputs.q.device))
        recalls.append(_recall(own, inputs.block_idx[:, begin:end]))
        recalls_random.append(_recall(own, random.to(own.device)))
        masses.append(mass)
    if not recalls:
        return None
    by_head = torch.cat(recalls).mean(0)
    selected, best, of_random, window = torch.cat(masses).mean(0).tolist()
    return Fit(
        queries=sum(map(len, recalls)),
        recall=float(by_head.mean()),
        recall_by_kv_head=by_head.tolist(),
        recall_random=float(torch.cat(recalls_random).mean()),
        mass_selected=selected,
        mass_own_best=best,
        mass_random=of_random,
        mass_window=window,
    )


def selection_maps(inputs: LayerInputs) -> list[list[list[float | None]]]:
    """Which blocks are selected from where, a map for each KV head.

    Returns: [G][row][column] the part of (query, visible block) pairs that are selected. Rows cut
    the queries into equal parts, columns the keys; None where no query of the row sees a key.
    """
    length, groups = inputs.q.shape[1], inputs.k.shape[2]
    num_blocks = -(-length // inputs.block_size)
    rows, columns = min(MAP_ROWS, num_blocks), min(MAP_COLUMNS, num_blocks)
    selected = torch.zeros(groups, rows, columns)
    visible = torch.zeros(rows, columns)
    column_of = torch.arange(num_blocks) * columns // num_blocks
    for begin, end in inputs.slabs():
        queries = torch.arange(begin, end)
        row_of = queries * rows // length
        seen = (torch.arange(num_blocks) <= queries[:, None] // inputs.block_size).float()
        visible.index_add_(0, row_of, _sum_columns(seen, column_of, columns))
        chosen = _one_hot(inputs.block_idx[0, begin:end].cpu(), num_blocks)  # [t, G, N]
        for head in range(groups):
            selected[head].index_add_(
                0, row_of, _sum_columns(chosen[:, head].float(), column_of, columns)
            )
    share = selected / visible
    return [
        [[None if value != value else value for value in row] for row in head]
        for head in share.tolist()
    ]


def _slab_masses(
    inputs: LayerInputs, begin: int, end: int, random: Tensor
) -> tuple[Tensor, Tensor]:
    """Own top blocks (1, t, G, K), and the masses of selected, own, random and window: (t, 4)."""
    q, seen = inputs.q[:, begin:end], inputs.key_range.slab(begin, end)
    common: dict[str, Any] = {"scale": inputs.scale, "softcap": inputs.softcap, "key_range": seen}
    kept, size = inputs.block_idx.shape[-1], inputs.block_size
    k, v = inputs.k, inputs.v
    full = full_attention(q, k, v, block_size=size, top_k_blocks=kept, **common)
    assert full.block_idx is not None, "blocks were asked for"
    given = inputs.block_idx[:, begin:end]
    lse = [
        block_sparse_attention(q, k, v, blocks, block_size=size, **common).lse
        for blocks in (given, full.block_idx, random)
    ]
    window = sliding_window_attention(q, k, v, window_tokens=inputs.window_tokens, **common)
    masses = torch.stack([*lse, window.lse], -1).sub(full.lse[..., None]).exp()  # [1, t, H, 4]
    return full.block_idx, masses.mean(2)[0].cpu()


def _recall(own: Tensor, given: Tensor) -> Tensor:
    """Part of ``own`` blocks that are in ``given``, both (1, t, G, K): (t, G)."""
    found = (own[..., None] == given[..., None, :]).any(-1) & (own >= 0)
    return (found.sum(-1) / (own >= 0).sum(-1))[0].cpu()


def _random_blocks(visible: Tensor, groups: int, kept: int, chance: torch.Generator) -> Tensor:
    """``kept`` random ones of the first ``visible`` (t,) blocks: (1, t, G, K)."""
    num_blocks = int(visible.max())
    order = torch.rand(len(visible), groups, num_blocks, generator=chance)
    hidden = torch.arange(num_blocks) >= visible[:, None, None]
    return order.masked_fill(hidden, -1.0).topk(kept).indices.int()[None]


def _one_hot(block_idx: Tensor, num_blocks: int) -> Tensor:
    """(t, G, K) indices with -1 pads as (t, G, N) bool."""
    slots = torch.where(block_idx < 0, num_blocks, block_idx.long())
    chosen = torch.zeros(*block_idx.shape[:2], num_blocks + 1, dtype=torch.bool)
    return chosen.scatter_(2, slots, True)[..., :num_blocks]


def _sum_columns(values: Tensor, column_of: Tensor, columns: int) -> Tensor:
    """Sum (t, N) block values into (t, columns)."""
    return values.new_zeros(len(values), columns).index_add_(1, column_of, values)
