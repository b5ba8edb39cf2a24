"""Needle forensics: who looks for a needle's block, who selects it, and who reads it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hysparse_cli.inspect_topk.blocks import BlockShares
from hysparse_cli.inspect_topk.branches import BranchSlab


@dataclass(frozen=True)
class LayerNeedle:
    """What one layer does with one of the needle's blocks, at the queries that look for it.

    mass: the part of the layer's own full attention that falls on the block, mean over heads;
    top_head_mass: of the head that gives it most. rank: of the block among those the query sees, by
    the layer's own scores, in the KV head that ranks it best (means over the queries). selected: in
    what part of the lists that the layer writes or reads (queries x KV heads) the block is;
    selected_for_top_head: of the lists for the head that gives it most; selected_by_kv_head: of
    each KV head; selected_ever: of all queries that see the block; None for a full layer that
    serves none. gate: of the block-sparse branch, mean; read, top_head_read:
    gate times what the branch's softmax gives the block; None where the layer did not run sparse.
    """

    layer: int
    mass: float
    top_head_mass: float
    rank: float
    selected: float | None
    selected_for_top_head: float | None
    selected_by_kv_head: list[float] | None
    selected_ever: float | None
    gate: float | None
    read: float | None
    top_head_read: float | None


class NeedleStatistics:
    """Watches one layer at the ``queries`` that look for ``blocks``."""

    def __init__(self, blocks: list[int], queries: list[int]):
        self.blocks, self.queries = blocks, queries
        self.mass: list[Tensor] = []  # (H, n) a query
        self.rank: list[Tensor] = []  # (G, n)
        self.gate: list[Tensor] = []  # (H,)
        self.read: list[Tensor] = []  # (H, n)

    def add(self, shares: BlockShares, branch: BranchSlab | None) -> None:
        for query in self.queries:
            if not shares.begin <= query < shares.end:
                continue
            at = query - shares.begin
            scores = shares.log_score[at]  # [G, N]
            self.mass.append(shares.mass[at][:, self.blocks])
            above = scores[:, None] > scores[:, self.blocks, None]
            self.rank.append(above.sum(-1).float() + 1)
            if branch is not None:
                self.gate.append(branch.gates[at, :, 0])
                self.read.append(branch.read[at][:, self.blocks])

    def found(self, layer: int, selection: Tensor | None, block_size: int) -> list[LayerNeedle]:
        """One for each block.

        Args:
            selection: (T, G, K), what the layer selects or is given; or None.
        """
        if not self.blocks:
            return []
        mass, rank = torch.stack(self.mass).mean(0), torch.stack(self.rank).mean(0)
        read = torch.stack(self.read).mean(0) if self.read else None
        found = []
        for i, block in enumerate(self.blocks):
            by_head, ever = None, None
            if selection is not None:
                is_in = (selection == block).any(-1).float()  # [T, G]
                by_head = is_in[self.queries].mean(0).tolist()
                ever = float(is_in[block * block_size :].mean())
            top_head = int(mass[:, i].argmax())
            group = top_head * len(rank) // len(mass)
            found.append(
                LayerNeedle(
                    layer=layer,
                    mass=float(mass[:, i].mean()),
                    top_head_mass=float(mass[top_head, i]),
                    rank=float(rank[:, i].min()),
                    selected=None if by_head is None else sum(by_head) / len(by_head),
                    selected_for_top_head=None if by_head is None else by_head[group],
                    selected_by_kv_head=by_head,
                    selected_ever=ever,
                    gate=float(torch.stack(self.gate).mean()) if self.gate else None,
                    read=None if read is None else float(read[:, i].mean()),
                    top_head_read=None if read is None else float(read[:, i].max()),
                )
            )
        return found


def blocks_of(tokens: tuple[int, int], block_size: int) -> list[int]:
    """The blocks that hold the tokens [begin, end)."""
    begin, end = tokens
    return list(range(begin // block_size, (end - 1) // block_size + 1))
