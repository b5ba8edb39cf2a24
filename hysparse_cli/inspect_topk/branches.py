"""Measures a sparse layer's two branches: how far their gates open, and what their sinks take."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hysparse_cli.inspect_topk.blocks import BlockShares, on_blocks
from hysparse_cli.model.config import HysparseSpec


@dataclass(frozen=True)
class BranchStatistics:
    """Means over all queries and heads of a sparse layer, as it ran.

    gate_sparse, gate_window: the sigmoid gates; 1 and 0 where there is no SWA branch. sink_sparse,
    sink_window: the part of each branch's softmax that its sink takes.
    """

    gate_sparse: float
    gate_window: float
    sink_sparse: float
    sink_window: float


class BranchSlab(NamedTuple):
    """gates, sinks: (t, H, 2), block-sparse branch first. read: (t, H, N), gate times softmax."""

    gates: Tensor
    sinks: Tensor
    read: Tensor


def branch_slab(
    spec: HysparseSpec,
    own: BlockShares,
    served: BlockShares,
    selection: Tensor,
    gates: Tensor,
    sinks: Tensor,
) -> BranchSlab:
    """One slab of a layer's queries.

    Args:
        own: over the layer's own keys. served: of the same queries over the server's keys.
        selection: (t, G, K). gates: (t, H, 2). sinks: (H, 2) logits, the family's own added.
    """
    sparse = served if spec.sparse_kv == "shared" else own
    window = own if spec.window_kv == "own" else served
    tiny = torch.finfo(sparse.mass.dtype).tiny  # nothing of a branch's keys: its sink takes all
    selected = on_blocks(sparse.mass, selection).clamp(min=tiny)
    recent = window.window.sum(-1).clamp(min=tiny)
    lse = torch.stack([sparse.lse + selected.log(), window.lse + recent.log()], -1)
    taken = torch.sigmoid(sinks - lse)
    is_selected = selection[..., None, :] == torch.arange(sparse.mass.shape[-1])[:, None].to(
        selection.device
    )
    chosen = is_selected.any(-1).repeat_interleave(sinks.shape[0] // selection.shape[1], 1)
    share = (gates[..., 0] * (1 - taken[..., 0]) / selected)[..., None]
    return BranchSlab(gates, taken, share * sparse.mass * chosen)


class BranchSums:
    """Adds up a layer's gates and sinks, slab by slab."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.queries = 0

    def add(self, slab: BranchSlab) -> None:
        of_slab = torch.cat([slab.gates, slab.sinks], -1).double().mean(1).sum(0)
        self.sums.append(of_slab)
        self.queries += len(slab.gates)

    def branches(self) -> BranchStatistics:
        return BranchStatistics(*(torch.stack(self.sums).sum(0) / self.queries).tolist())
