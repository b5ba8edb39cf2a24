"""Reduces each attention layer to statistics while the model runs, dense or converted."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from hysparse_cli.families import family_of
from hysparse_cli.inspect_topk.blocks import BlockShares, LayerInputs, block_shares
from hysparse_cli.inspect_topk.branches import BranchSlab, BranchStatistics, BranchSums, branch_slab
from hysparse_cli.inspect_topk.needle import LayerNeedle, NeedleStatistics, blocks_of
from hysparse_cli.inspect_topk.reading import Reading
from hysparse_cli.inspect_topk.statistics import Fit, FitSums, OverlapSums
from hysparse_cli.inspect_topk.subject import Subject
from hysparse_cli.model.attention import LayerCall
from hysparse_cli.model.observe import observe
from hysparse_kernels.selection import select_blocks

OnLayer = Callable[[int, int], None]


@dataclass
class Seen:
    """What was seen of one text.

    selections: full layer that serves -> (T, G, K). fits: sparse layer -> its fit over all queries
    and over those that predict an answer, None where none of them chooses. branches: sparse layer
    -> its branches, of a converted model. needle: all layers, of each of the needle's blocks.
    overlap: see ``OverlapSums``; over all queries, and over those that predict an answer.
    """

    selections: dict[int, Tensor] = field(default_factory=dict)
    fits: dict[int, tuple[Fit | None, Fit | None]] = field(default_factory=dict)
    branches: dict[int, BranchStatistics] = field(default_factory=dict)
    needle: list[list[LayerNeedle]] = field(default_factory=list)
    overlap: tuple[list[list[float]] | None, ...] = ()


@torch.no_grad()
def look(subject: Subject, reading: Reading, on_layer: OnLayer) -> tuple[Seen, Tensor]:
    """Run the model over the text: a dense one densely, a converted one as it is.

    Args:
        on_layer: told layers done, and of how many.
    Returns: what was seen; and (1, T, hidden), what the model's head reads.
    """
    input_ids = torch.tensor([reading.ids], device=subject.model.device)
    statistics = _LayerStatistics(subject, reading, on_layer)
    hidden = observe(subject.model, input_ids, statistics)
    statistics.seen.overlap = tuple(sums.similarity() for sums in statistics.overlaps)
    return statistics.seen, hidden


class _LayerStatistics:
    """The observer of a forward: reduces each layer to its statistics."""

    def __init__(self, subject: Subject, reading: Reading, on_layer: OnLayer):
        self.subject, self.asked, self.on_layer = subject, reading.asked, on_layer
        self.spec, self.layout, self.sizes = subject.spec, subject.spec.layers, subject.sizes
        self.seen = Seen()
        self.server_k: Tensor
        self.looking = torch.zeros(len(reading.ids), dtype=torch.bool, device=subject.model.device)
        self.looking[reading.looking] = True
        self.selections: list[Tensor] = []  # (T, G, K), what each layer would select
        self.overlaps = [
            OverlapSums(subject.num_layers, self.sizes, of) for of in (None, self.looking)
        ]
        self.blocks: list[int] = []
        if self.asked is not None:
            self.blocks = blocks_of(self.asked.needle, self.sizes.block_size)
            self.seen.needle = [[] for _ in self.blocks]

    def __call__(self, call: LayerCall) -> Tensor:
        out, gates = call.attend(), call.gates
        if call.branches is not None and gates is None:  # no SWA branch
            gates = call.q.new_tensor([1.0, 0.0]).float().expand(*call.q.shape[:3], 2)
        inputs = LayerInputs(call.q, call.k, call.scale, call.softcap, call.sinks)
        self._look(call.layer, inputs, call.block_idx, gates)
        return out

    def _look(
        self, layer: int, inputs: LayerInputs, block_idx: Tensor | None, gates: Tensor | None
    ) -> None:
        """Args: block_idx: (1, T, G, K), of a converted model. gates: (1, T, H, 2), if sparse."""
        self.on_layer(layer, self.subject.num_layers)
        is_served = layer in self.layout.sparse_layers
        given = self.seen.selections[self.layout.server_of(layer)] if is_served else None
        fits = FitSums(self.sizes), FitSums(self.sizes, self.looking)
        branches, own = BranchSums(), []
        needle = NeedleStatistics(self.blocks, self.asked.queries if self.asked else [])
        for shares, slab in self._slabs(layer, inputs, given, gates):
            best = select_blocks(shares.log_score, self.sizes.top_k_blocks)
            own.append(best)
            for overlap in self.overlaps:
                overlap.add(layer, shares, best, self.selections)
            if given is not None:
                for fit in fits:
                    fit.add(shares, given[shares.begin : shares.end], best)
            if slab is not None:
                branches.add(slab)
            needle.add(shares, slab)
        if is_served:
            self.seen.fits[layer] = fits[0].fit(), fits[1].fit()
        if gates is not None:
            self.seen.branches[layer] = branches.branches()
        selection = torch.cat(own)
        if self.layout.serves(layer):
            selection = selection if block_idx is None else block_idx[0].int()
            self.seen.selections[layer], self.server_k = selection, inputs.k
            given = selection
        self.selections.append(selection)
        for of_block, found in zip(
            self.seen.needle, needle.found(layer, given, self.sizes.block_size), strict=True
        ):
            of_block.append(found)
        self.on_layer(layer + 1, self.subject.num_layers)

    def _slabs(
        self, layer: int, inputs: LayerInputs, given: Tensor | None, gates: Tensor | None
    ) -> Iterable[tuple[BlockShares, BranchSlab | None]]:
        """The layer's own attention, and with gates what its branches do."""
        own = block_shares(inputs, self.sizes)
        if given is None or gates is None:
            yield from zip(own, repeat(None))
            return
        served = block_shares(inputs._replace(k=self.server_k), self.sizes)
        sinks = self._sinks(layer, inputs)
        for shares, of_server in zip(own, served, strict=True):
            here = slice(shares.begin, shares.end)
            slab = branch_slab(self.spec, shares, of_server, given[here], gates[0, here], sinks)
            yield shares, slab

    def _sinks(self, layer: int, inputs: LayerInputs) -> Tensor:
        """(H, 2) of a sparse layer's branches; one that is not there has none."""
        path = family_of(self.subject.model.config.model_type).attention.format(layer=layer)
        sinks = self.subject.model.get_submodule(path).hysparse.sinks.float()
        if inputs.sinks is not None:
            sinks = sinks + inputs.sinks[:, None]
        return F.pad(sinks, (0, 2 - sinks.shape[1]), value=-torch.inf)
