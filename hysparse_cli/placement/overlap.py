"""Measures how well each layer could be served by each earlier one, in one pass of the dense model.

Shape suffixes as in hysparse_kernels.reference; t is the queries looked at in a row of text: a
random few of those that see more than is selected. So the cost of all pairs of layers stays below
that of the dense forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hysparse_cli.families import family_of
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.observe import LayerSeen, watch_attention
from hysparse_kernels import (
    KeyRange,
    block_sparse_attention,
    full_attention,
    sliding_window_attention,
)

QUERIES_PER_ROW = 64
LEAST_GATE, RIDGE = 0.02, 1e-4


@dataclass(frozen=True)
class Overlap:
    """Means over calibration text. A pair is (server a, served b), a < b; other cells are 0.

    importance[b]: 1 - cos of b's residual before and after its attention, how much that turns it.
    similarity[a][b]: b's attention mass on the blocks that a selects, of that on b's own best.
    mass[a][b]: the same of all of b's attention.
    damage[a][b]: squared error of b's attention output, of its square, where b reads a's keys and
    values at a's blocks and its own within its window, each under the gates that fit best.
    """

    importance: list[float]
    similarity: list[list[float]]
    mass: list[list[float]]
    damage: list[list[float]]


@dataclass(frozen=True)
class Fitted:
    """``gate_logits[a, b]`` (H, 2) are the constant gates with which a serves b best."""

    overlap: Overlap
    gate_logits: dict[tuple[int, int], Tensor]


class _Pair:
    """Sums over text of one pair; the features of the fit are each head's branches, projected."""

    def __init__(self) -> None:
        self.mass: list[Tensor] = []
        self.gram: Tensor | float = 0.0  # [2H, 2H]
        self.target: Tensor | float = 0.0  # [2H]
        self.energy: Tensor | float = 0.0

    def add(self, features: Tensor, wanted: Tensor) -> None:
        """Args: features: (t, 2H, hidden). wanted: (t, hidden)."""
        self.gram = self.gram + torch.einsum("tie,tje->ij", features, features)
        self.target = self.target + torch.einsum("tie,te->i", features, wanted)
        self.energy = self.energy + wanted.square().sum()

    def solve(self) -> tuple[Tensor, float]:
        """Gates (2H,) within what a sigmoid gives, and the damage that they leave."""
        assert isinstance(self.gram, Tensor) and isinstance(self.target, Tensor)
        ridge = RIDGE * self.gram.diagonal().mean().clamp(min=1e-30)
        regular = self.gram + ridge * torch.eye(len(self.gram), device=self.gram.device)
        gates = torch.linalg.solve(regular, self.target).clamp(LEAST_GATE, 1 - LEAST_GATE)
        left = self.energy - 2 * gates @ self.target + gates @ self.gram @ gates
        return gates, float(left / self.energy)


def measure_overlap(
    model: Any,
    rows: Tensor,
    spec: HysparseSpec,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> Fitted:
    """Measure all pairs of layers of a dense model on ``rows`` (N, T).

    A sliding window that a dense layer has is not kept to: as a full layer it would see everything.

    Args:
        spec: the sizes of blocks, selection and window; its pattern is not read.
        on_progress: told rows done, and of how many.
    """
    pairs = _Pairs(model, spec)
    random = torch.Generator().manual_seed(seed)
    for done, row in enumerate(rows):
        on_progress(done, len(rows))
        pairs.start_row(_some_queries(len(row), spec, random).to(model.device))
        watch_attention(model, row[None], pairs.on_layer)
    on_progress(len(rows), len(rows))
    return pairs.result()


class _Pairs:
    """Adds up what all pairs of layers give, layer by layer and row by row."""

    def __init__(self, model: Any, spec: HysparseSpec):
        family = family_of(model.config.model_type)
        assert spec.kind.gate is not None, "the spec is of sizes, its layout the default"
        self.spec, self.gate = spec, spec.kind.gate
        layers = range(model.config.num_hidden_layers)
        places = [f"{family.attention.format(layer=layer)}.{family.output}" for layer in layers]
        self.outputs: list[Any] = [model.get_submodule(place) for place in places]
        self.pairs = {(a, b): _Pair() for b in layers for a in range(b)}
        self.turned: list[list[Tensor]] = [[] for _ in layers]
        self.own_mass: list[list[Tensor]] = [[] for _ in layers]
        self.queries: Tensor
        self.served: list[tuple[Tensor, Tensor, Tensor]] = []

    def start_row(self, queries: Tensor) -> None:
        self.queries, self.served = queries, []

    def on_layer(self, layer: int, seen: LayerSeen) -> None:
        spec, k, v = self.spec, seen.k, seen.v
        q, out = seen.q[:, self.queries], seen.out[:, self.queries]
        residual = seen.residual[0, self.queries].float()
        added = self.outputs[layer](out.flatten(2))[0].float()
        turn = 1 - F.cosine_similarity(residual, residual + added, dim=-1)
        self.turned[layer].append(turn.mean())
        common: dict[str, Any] = {
            "scale": seen.scale,
            "softcap": seen.softcap,
            "sinks": seen.sinks,
            "key_range": KeyRange(None, self.queries[None]),
        }
        blocks: dict[str, Any] = {"block_size": spec.block_size, **common}
        full = full_attention(q, k, v, top_k_blocks=spec.top_k_blocks, **blocks)
        assert full.block_idx is not None, "blocks were asked for"
        own = _mass(block_sparse_attention(q, k, v, full.block_idx, **blocks).lse, full.lse)
        self.own_mass[layer].append(own.mean())
        window = sliding_window_attention(q, k, v, window_tokens=spec.window_tokens, **common)
        project = _Projection(self.outputs[layer], q.shape[2])
        wanted = project(out).sum(1)
        of_window = project(window.out)
        for server, (shared_k, shared_v, block_idx) in enumerate(self.served):
            pair = self.pairs[server, layer]
            mass = _mass(block_sparse_attention(q, k, v, block_idx, **blocks).lse, full.lse)
            pair.mass.append(mass.mean())
            read = block_sparse_attention(q, shared_k, shared_v, block_idx, **blocks)
            pair.add(torch.stack([project(read.out), of_window], 2).flatten(1, 2), wanted)
        self.served.append((k, v, full.block_idx))

    def result(self) -> Fitted:
        layers = range(len(self.outputs))
        empty = [[0.0] * len(layers) for _ in layers]
        similarity, mass, damage = ([list(row) for row in empty] for _ in range(3))
        gate_logits = {}
        for (server, layer), pair in self.pairs.items():
            mass[server][layer] = float(torch.stack(pair.mass).mean())
            # a ratio of means: a head that looks elsewhere would make a mean of ratios anything
            own = float(torch.stack(self.own_mass[layer]).mean())
            similarity[server][layer] = mass[server][layer] / own
            gates, damage[server][layer] = pair.solve()
            gate_logits[server, layer] = self.gate.logits(gates.view(-1, 2), 0.0)
        importance = [float(torch.stack(turns).mean()) for turns in self.turned]
        return Fitted(Overlap(importance, similarity, mass, damage), gate_logits)


class _Projection:
    """Each head's share of what attention adds to the residual."""

    def __init__(self, linear: Any, num_heads: int):
        self.weight = linear.weight.float().unflatten(1, (num_heads, -1))  # [hidden, H, Dv]

    def __call__(self, out: Tensor) -> Tensor:
        """(1, t, H, Dv) -> (t, H, hidden)."""
        return torch.einsum("thd,ehd->the", out[0].float(), self.weight)


def _some_queries(length: int, spec: HysparseSpec, random: torch.Generator) -> Tensor:
    """Positions that have to choose; in rows too short for that, such as see beyond a window."""
    first = (
        spec.top_k_tokens if length > spec.top_k_tokens else min(spec.window_tokens, length // 2)
    )
    chosen = torch.randperm(length - first, generator=random)[:QUERIES_PER_ROW] + first
    return chosen.sort().values


def _mass(lse: Tensor, full_lse: Tensor) -> Tensor:
    return (lse - full_lse).exp()
