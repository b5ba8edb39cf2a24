"""Fits q, k, v and o of each sparse layer to the values that it shares (``--init aligned``).

The block-sparse branch reads its server's values, but o_proj was trained on the layer's own. First
the layer's KV heads are put in the order that suits the server's. Then a matrix A for each KV head
takes the branch's output to where the layer's own would be; folded into o and v, it costs nothing
at run time. It is found with the gates in turns: given A, the best pair of gates for each token;
given the gates, A by ridge regression of g_s o_s on o - g_w o_w. Then gates are fitted as in
``copy``. Maps of q and k that commute with RoPE were measured to change next to nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.families import family_of
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.observe import LayerSeen
from hysparse_cli.model.state import Shared
from hysparse_cli.start.fit import fit_all_gates
from hysparse_cli.start.gates import best_gates, products_of
from hysparse_cli.start.heads import Order, PairFit, reorder, reordered
from hysparse_cli.start.result import OnProgress, Start, counted
from hysparse_cli.start.server_outputs import branches_of, watch_served
from hysparse_cli.start.values import MapFit, fold, fold_is_exact, mapped

ORDER_ROWS = 2  # each costs a pass of the branch for every KV head
ROUNDS = 3
LEAST_GATE = 0.05  # a branch whose gate is closed would never be fitted


@torch.no_grad()
def aligned(model: Any, spec: HysparseSpec, rows: Tensor, on_progress: OnProgress) -> Start:
    """Changed projections, and fitted gates, of every sparse layer.

    Args: as of ``fit_all_gates``; there are ``ROUNDS`` passes over the rows before its own, and one
        over the first ``ORDER_ROWS`` before these.
    Raises: UnsupportedModel where the family's values can't be folded.
    """
    fold_is_exact(model.config)
    passes = min(ORDER_ROWS, len(rows)) + (ROUNDS + 1) * len(rows)
    advance = counted(on_progress, passes + len(spec.layers.sparse_layers))
    orders = _find_orders(model, spec, rows[:ORDER_ROWS], advance)
    maps: dict[int, Tensor] = {}
    for _ in range(ROUNDS):
        maps = _fit_maps(model, spec, rows, orders, maps, advance)
    start = fit_all_gates(model, spec, rows, orders, maps, advance)
    family, tensors = family_of(model.config.model_type), dict(start.tensors)
    for layer, A in maps.items():
        path = family.attention.format(layer=layer)
        moved = reorder(model, layer, orders[layer])
        changed = moved | fold(family, moved, A)
        tensors |= {f"{path}.{name}": tensor.cpu() for name, tensor in changed.items()}
    return Start(tensors, start.fits)


def _find_orders(
    model: Any, spec: HysparseSpec, rows: Tensor, advance: Callable[[], None]
) -> dict[int, Order]:
    fits: dict[int, PairFit] = {}

    def on_served(layer: int, seen: LayerSeen, shared: Shared) -> None:
        fits.setdefault(layer, PairFit(*seen.v.shape[2:])).add(spec, seen, shared)

    for row in rows:
        watch_served(model, spec, row, on_served)
        advance()
    return {layer: fit.order() for layer, fit in fits.items()}


def _fit_maps(
    model: Any,
    spec: HysparseSpec,
    rows: Tensor,
    orders: Mapping[int, Order],
    before: Mapping[int, Tensor],
    advance: Callable[[], None],
) -> dict[int, Tensor]:
    """Each sparse layer's map, given the gates that are best with the maps ``before``."""
    fits: dict[int, MapFit] = {}

    def on_served(layer: int, seen: LayerSeen, shared: Shared) -> None:
        seen = reordered(seen, orders[layer])
        sparse, window = (branch.out.float() for branch in branches_of(spec, seen, shared))
        gates = torch.tensor([1.0, 0.0], device=sparse.device)  # as if it stood alone
        if layer in before:
            out = mapped(sparse, before[layer])
            best = best_gates(products_of(out, window, seen.out))
            gates = best.view(*out.shape[:3], 2).clamp(min=LEAST_GATE)
        fit = fits.setdefault(layer, MapFit(*seen.v.shape[2:]))
        fit.add(gates[..., :1] * sparse, seen.out - gates[..., 1:] * window)

    for row in rows:
        watch_served(model, spec, row, on_served)
        advance()
    return {layer: fit.solve() for layer, fit in fits.items()}
