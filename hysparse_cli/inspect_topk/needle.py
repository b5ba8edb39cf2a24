"""Follows a needle: who looks for its blocks, selects and reads them, and what that is worth.

What it is worth: the answer's probability with the selections as they are, and with the needle's
blocks forced into them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hysparse_cli.inspect_topk.blocks import BlockShares
from hysparse_cli.inspect_topk.branches import BranchSlab
from hysparse_cli.inspect_topk.reading import Asked
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.logits import hidden_states, logits_of
from hysparse_cli.model.state import ForwardOptions, Variation

FULL, OWN_KEYS, AS_IT_IS = "full attention", "own keys", "as it is"
OnProgress = Callable[[int, int], None]


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


@dataclass(frozen=True)
class Effect:
    """The answer in one forward.

    attention: how the sparse layers attend: "full attention", to all of their own keys; "own keys",
    to those at the selected blocks and in the window, as one softmax: what selection alone does;
    "as it is", with shared keys and values, gates and sinks.
    forced_into: the full layers whose selections were given the needle's blocks. nats: of the
    answer's tokens, mean; probability: of the whole answer; None without one. next_token: the
    likeliest where the answer begins, or after the text.
    """

    attention: str
    forced_into: list[int]
    nats: float | None
    probability: float | None
    next_token: str
    next_probability: float


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


@torch.no_grad()
def answer_in(
    model: Any, tokenizer: Any, ids: list[int], asked: Asked, hidden: Tensor
) -> tuple[float | None, float | None, str, float]:
    """nats, probability, next token and its probability, of the answer.

    Args:
        hidden: (1, T, hidden), as ``hidden_states`` gives.
    """
    log_p = F.log_softmax(logits_of(model, hidden[:, asked.queries])[0].float(), -1)
    likeliest = int(log_p[0].argmax())
    following = tokenizer.decode([likeliest]), float(log_p[0, likeliest].exp())
    begin, end = asked.answer
    if begin == end:
        return None, None, *following
    answer = torch.tensor(ids[begin:end], device=log_p.device)
    of_answer = log_p.gather(1, answer[:, None]).double()
    return -float(of_answer.mean()), float(of_answer.sum().exp()), *following


def measure_effects(
    model: Any,
    tokenizer: Any,
    spec: HysparseSpec,
    ids: list[int],
    asked: Asked,
    blocks: list[int],
    by_server: str,
    on_progress: OnProgress,
) -> list[Effect]:
    """The answer with the selections as they are, and with ``blocks`` forced into all of them.

    Args:
        model: with sparse attention layers.
        by_server: OWN_KEYS or AS_IT_IS: for that, they are also forced into one layer's alone.
        on_progress: told forwards done, and of how many.
    """
    forwards = list(_forwards(spec, blocks, by_server))
    input_ids = torch.tensor([ids], device=model.device)
    effects = []
    for i, (name, variation) in enumerate(forwards):
        on_progress(i, len(forwards))
        with torch.no_grad():
            hidden = hidden_states(model, input_ids, hysparse=ForwardOptions(variation=variation))
        answer = answer_in(model, tokenizer, ids, asked, hidden)
        effects.append(Effect(name, sorted(variation.forced_blocks), *answer))
    on_progress(len(forwards), len(forwards))
    return effects


def _forwards(
    spec: HysparseSpec, blocks: list[int], by_server: str
) -> Iterator[tuple[str, Variation]]:
    layout = spec.layers
    sparse, servers = frozenset(layout.sparse_layers), [*filter(layout.serves, layout.full_layers)]
    own = replace(spec, sparse_kv="own", window_kv="none" if spec.window_kv == "none" else "own")
    for name, switches in ((OWN_KEYS, own), (AS_IT_IS, spec)):
        each = [[server] for server in servers] if name == by_server and len(servers) > 1 else []
        for into in ([], servers, *each):
            forced = dict.fromkeys(into, tuple(blocks))
            yield name, Variation(switches, sparse, switches is spec, forced)
