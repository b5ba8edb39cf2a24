"""How well each layer's selection would serve each later layer: what ``dp`` goes by."""

import torch
from torch import Tensor

from hysparse_cli.inspect_topk.blocks import BlockShares, Sizes, on_blocks
from hysparse_cli.inspect_topk.fit import first_choice


class OverlapSums:
    """Adds up, layer by layer, the mass of b's attention on the blocks that each a < b selects."""

    def __init__(self, num_layers: int, sizes: Sizes):
        self.sizes, self.num_layers = sizes, num_layers
        self.selections: list[Tensor] = []
        self.mass = torch.zeros(num_layers, num_layers, dtype=torch.float64)

    def add(self, layer: int, shares: BlockShares, own: Tensor) -> None:
        """Args: own: (t, G, K), the layer's own top blocks of the slab's queries."""
        begin = max(shares.begin, first_choice(self.sizes))
        if begin >= shares.end:
            return
        here = slice(begin - shares.begin, None)
        mass = shares.mass[here]
        by_server = [on_blocks(mass, given[begin : shares.end]) for given in self.selections]
        by_server.append(on_blocks(mass, own[here]))
        sums = torch.stack([part.double().mean(1).sum() for part in by_server])
        self.mass[: layer + 1, layer] += sums.cpu()

    def end_layer(self, selection: Tensor) -> None:
        """Args: selection: (T, G, K), what the layer selects, for the layers after it."""
        self.selections.append(selection)

    def similarity(self) -> list[list[float]] | None:
        """[a][b], as ``selection.overlap.Overlap.similarity``, over all queries that choose.

        1 on the diagonal, 0 below it; None where no query chooses.
        """
        own = self.mass.diagonal()
        if not bool((own > 0).all()):
            return None
        ratios: list[list[float]] = (self.mass / own).tolist()
        return ratios
