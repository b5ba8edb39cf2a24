"""How well each layer's selection would serve each later layer: what ``dp`` goes by."""

import torch
from torch import Tensor

from hysparse_cli.inspect_topk.blocks import BlockShares, Sizes, on_blocks


class OverlapSums:
    """Adds up, layer by layer, the mass of b's attention on the blocks that each a < b selects.

    Over ``of`` the queries that choose, (T,) bool, or over all that do.
    """

    def __init__(self, num_layers: int, sizes: Sizes, of: Tensor | None = None):
        self.sizes, self.of = sizes, of
        self.mass = torch.zeros(num_layers, num_layers, dtype=torch.float64)

    def add(self, layer: int, shares: BlockShares, own: Tensor, before: list[Tensor]) -> None:
        """Add a slab of queries.

        Args:
            own: (t, G, K), the layer's own top blocks. before: (T, G, K), of each layer before it.
        """
        queries = torch.arange(shares.begin, shares.end, device=own.device)
        queries = queries[queries >= self.sizes.first_choice]
        if self.of is not None:
            queries = queries[self.of[queries]]
        if not len(queries):
            return
        here = queries - shares.begin
        mass = shares.mass[here]
        selections = [*(selection[queries] for selection in before), own[here]]
        sums = torch.stack([on_blocks(mass, s).double().mean(1).sum() for s in selections])
        self.mass[: layer + 1, layer] += sums.cpu()

    def similarity(self) -> list[list[float]] | None:
        """[a][b], as ``selection.overlap.Overlap.similarity``, over all queries that choose.

        1 on the diagonal, 0 below it; None where no query chooses.
        """
        own = self.mass.diagonal()
        if not bool((own > 0).all()):
            return None
        ratios: list[list[float]] = (self.mass / own).tolist()
        return ratios
