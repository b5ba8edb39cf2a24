"""Permutes the KV heads of a sparse layer, so that each reads the server's head that fits it.

Shape suffixes: H query heads, G KV heads, R query heads of each, D head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.families import family_of
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.observe import LayerSeen
from hysparse_cli.model.state import Shared
from hysparse_cli.start.server_outputs import branches_of
from hysparse_cli.start.values import MapFit

Order = list[int]  # position g, which server head g serves, holds the layer's own head order[g]


class PairFit:
    """How well each KV head of a sparse layer does with each of its server's."""

    def __init__(self, num_kv_heads: int, head_dim: int):
        self.shifts = [MapFit(num_kv_heads, head_dim) for _ in range(num_kv_heads)]

    def add(self, spec: HysparseSpec, seen: LayerSeen, shared: Shared) -> None:
        """Read the server's heads in each cyclic order: together these are all pairs."""
        for shift, fit in enumerate(self.shifts):
            k, v = (x.roll(-shift, 2) for x in (shared.k, shared.v))
            rolled = Shared(k, v, shared.block_idx.roll(-shift, 2))
            fit.add(branches_of(spec, seen, rolled).sparse.out, seen.out)

    def order(self) -> Order:
        """The order of least error in all, of what maps can make of the heads' outputs."""
        heads = len(self.shifts)
        gains = torch.stack([fit.gains() for fit in self.shifts])  # [shift, own head]
        costs = [
            [-float(gains[(server - own) % heads, own]) for own in range(heads)]
            for server in range(heads)
        ]
        return assign(costs)


def reordered(seen: LayerSeen, order: Order) -> LayerSeen:
    """What was seen, with the layer's KV heads, and the query heads of each, in another order."""
    by_kv = torch.tensor(order, device=seen.q.device)
    by_query = query_order(order, seen.q.shape[2]).to(seen.q.device)
    return seen._replace(
        q=seen.q[:, :, by_query],
        k=seen.k[:, :, by_kv],
        v=seen.v[:, :, by_kv],
        out=seen.out[:, :, by_query],
        sinks=None if seen.sinks is None else seen.sinks[by_query],
    )


def reorder(model: Any, layer: int, order: Order) -> dict[str, Tensor]:
    """A layer's attention with its heads in another order: it computes what it did.

    Returns: all tensors of the attention that have heads, by name below it.
    """
    family = family_of(model.config.model_type)
    attention: Any = model.get_submodule(family.attention.format(layer=layer))
    num_heads = model.config.num_attention_heads
    D = attention.get_submodule(family.output).weight.shape[1] // num_heads
    by_query = query_order(order, num_heads)
    queries, kv = _rows(by_query.tolist(), D), _rows(order, D)
    fused = {
        "by kind": [*queries, *(num_heads * D + i for i in kv)]
        + [(num_heads + len(order)) * D + i for i in kv],
        "by head": _rows(order, 3 * D),
    }
    tensors = {}
    for name, parameter in attention.named_parameters():
        module = name.rpartition(".")[0]
        if name == f"{family.output}.weight":
            tensors[name] = parameter[:, queries]
        elif name == "sinks":
            tensors[name] = parameter[by_query]
        elif module == family.value and family.fused is not None:
            tensors[name] = parameter[fused[family.fused]]
        elif module != family.output and len(parameter) in (len(queries), len(kv)) and len(kv) > D:
            # q, k, v, their biases, and norms over all heads; with one KV head nothing moves
            tensors[name] = parameter[queries if len(parameter) == len(queries) else kv]
    return tensors


def query_order(order: Order, num_heads: int) -> Tensor:
    """(H,) the query heads in the order of their KV heads."""
    return torch.tensor(_rows(order, num_heads // len(order)))


def assign(costs: Sequence[Sequence[float]]) -> list[int]:
    """The column of each row, all different, such that the sum of their costs is least."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(costs)
    found: list[int] = columns.tolist()
    return found


def _rows(order: Sequence[int], size: int) -> list[int]:
    return [first * size + i for first in order for i in range(size)]
