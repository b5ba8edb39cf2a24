"""Adds up, slab by slab, how well selected blocks serve the layers that read them.

Only queries that choose count: those that see more blocks than are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hysparse_cli.inspect_topk.blocks import BlockShares, Sizes, even_blocks, on_blocks


@dataclass(frozen=True)
class Fit:
    """Means over ``queries`` that see more blocks than are kept (so many), and over heads.

    Recall is the part of the layer's own top blocks that are in a set of as many. Mass is the part
    of the layer's own full attention (own queries and keys) that falls on a set of keys: on the
    blocks that were ``selected`` for it, its ``own_best``, on ``random`` ones (what chance gives in
    the mean) and on ones ``even``ly spaced from the first to the query's own; in the sliding
    ``window``, on selection and window together (``seen``), on the ``first_block``, and on the
    family's own ``sink``, which only some have.
    """

    queries: int
    recall: float
    recall_by_kv_head: list[float]
    recall_random: float
    recall_even: float
    mass_selected: float
    mass_own_best: float
    mass_random: float
    mass_even: float
    mass_window: float
    mass_seen: float
    mass_first_block: float
    mass_sink: float


class FitSums:
    """Adds up a layer's fit, slab by slab, over ``of`` those queries, (T,) bool, or over all."""

    def __init__(self, sizes: Sizes, of: Tensor | None = None):
        self.sizes, self.of, self.queries = sizes, of, 0
        self.recalls: list[Tensor] = []
        self.masses: list[Tensor] = []

    def add(self, shares: BlockShares, given: Tensor, own: Tensor) -> None:
        """Args: given, own: (t, G, K), the blocks selected for the layer and its own top ones."""
        queries = _that_choose(shares, self.sizes, self.of)
        if not len(queries):
            return
        self.queries += len(queries)
        here = queries - shares.begin
        given, own = given[here], own[here]
        mass, window = shares.mass[here], shares.window[here]
        even = even_blocks(queries, self.sizes)[:, None].expand_as(given)
        chance = self.sizes.top_k_blocks / (queries // self.sizes.block_size + 1)
        chance_TG = chance[:, None].expand(given.shape[:2])
        self.recalls.append(
            torch.stack([_recall(own, given), chance_TG, _recall(own, even)], -1).double().sum(0)
        )
        total, of_window = mass.sum(-1), window.sum(-1)
        selected = on_blocks(mass, given)
        parts = (
            selected,
            on_blocks(mass, own),
            total * chance[:, None],
            on_blocks(mass, even),
            of_window,
            selected + of_window - on_blocks(window, given),
            mass[..., 0],
            (1 - total).clamp(min=0),
        )
        self.masses.append(torch.stack(parts, -1).double().mean(1).sum(0))

    def fit(self) -> Fit | None:
        """None where none of the queries has to choose."""
        if not self.recalls:
            return None
        by_head = torch.stack(self.recalls).sum(0) / self.queries  # [G, 3]
        recall, random, even = by_head.mean(0).tolist()
        masses = (torch.stack(self.masses).sum(0) / self.queries).tolist()
        return Fit(self.queries, recall, by_head[:, 0].tolist(), random, even, *masses)


class OverlapSums:
    """Adds up, layer by layer, the mass of b's attention on the blocks that each a < b selects.

    This is what the strategy ``dp`` goes by. Over ``of`` the queries that choose, (T,) bool, or
    over all that do.
    """

    def __init__(self, num_layers: int, sizes: Sizes, of: Tensor | None = None):
        self.sizes, self.of = sizes, of
        self.mass = torch.zeros(num_layers, num_layers, dtype=torch.float64)

    def add(self, layer: int, shares: BlockShares, own: Tensor, before: list[Tensor]) -> None:
        """Add a slab of queries.

        Args:
            own: (t, G, K), the layer's own top blocks. before: (T, G, K), of each layer before it.
        """
        queries = _that_choose(shares, self.sizes, self.of)
        if not len(queries):
            return
        here = queries - shares.begin
        mass = shares.mass[here]
        selections = [*(selection[queries] for selection in before), own[here]]
        sums = torch.stack([on_blocks(mass, s).double().mean(1).sum() for s in selections])
        self.mass[: layer + 1, layer] += sums.cpu()

    def similarity(self) -> list[list[float]] | None:
        """[a][b], as ``placement.overlap.Overlap.similarity``, over all queries that choose.

        1 on the diagonal, 0 below it; None where no query chooses.
        """
        own = self.mass.diagonal()
        if not bool((own > 0).all()):
            return None
        ratios: list[list[float]] = (self.mass / own).tolist()
        return ratios


def _that_choose(shares: BlockShares, sizes: Sizes, of: Tensor | None) -> Tensor:
    """Positions of the slab's queries that choose, of those in ``of`` (T,) bool where given."""
    queries = torch.arange(shares.begin, shares.end, device=shares.mass.device)
    queries = queries[queries >= sizes.first_choice]
    return queries if of is None else queries[of[queries]]


def _recall(own: Tensor, given: Tensor) -> Tensor:
    """Part of the ``own`` blocks that are in ``given``, both (t, G, K) without pads: (t, G)."""
    return (own[..., None] == given[..., None, :]).any(-1).float().mean(-1)
