"""``--init aligned``: o and v of each sparse layer fitted to the values that it shares.

The block-sparse branch reads its server's values, but o_proj was trained on the layer's own. A
matrix A for each KV head takes the branch's output to where the layer's own would be; folded into
the weights, it costs nothing at run time. It is found with the gates in turns: given A, the best
pair of gates for each token; given the gates, A by ridge regression of g_s o_s on o - g_w o_w. Then
gates are fitted as in ``copy``. Queries and keys stay: maps of q and k that commute with RoPE, and
other pairings of KV heads, were measured to change next to nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.calibrate.watch import LayerSeen
from hysparse_cli.init.fit import fit_all_gates
from hysparse_cli.init.gates import best_gates, products_of
from hysparse_cli.init.served import branches_of, watch_served
from hysparse_cli.init.start import OnProgress, Start, counted
from hysparse_cli.init.values import MapFit, fold, fold_is_exact, mapped
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.state import Shared

ROUNDS = 3
LEAST_GATE = 0.05  # a branch whose gate is closed would never be fitted


@torch.no_grad()
def aligned(model: Any, spec: HysparseSpec, rows: Tensor, on_progress: OnProgress) -> Start:
    """Changed o and v, and fitted gates, of every sparse layer.

    Args: as of ``fit_all_gates``; there are ``ROUNDS`` passes over the rows before its own.
    Raises: UnsupportedModel where the family's values can't be folded.
    """
    fold_is_exact(model.config)
    advance = counted(on_progress, (ROUNDS + 1) * len(rows) + len(spec.layers.sparse_layers))
    maps: dict[int, Tensor] = {}
    for _ in range(ROUNDS):
        maps = _fit_maps(model, spec, rows, maps, advance)
    start = fit_all_gates(model, spec, rows, maps, advance)
    tensors = dict(start.tensors)
    for layer, A in maps.items():
        tensors |= fold(model, layer, A)
    return Start(tensors, start.fits)


def _fit_maps(
    model: Any,
    spec: HysparseSpec,
    rows: Tensor,
    before: Mapping[int, Tensor],
    advance: Callable[[], None],
) -> dict[int, Tensor]:
    """Each sparse layer's map, given the gates that are best with the maps ``before``."""
    fits: dict[int, MapFit] = {}

    def on_served(layer: int, seen: LayerSeen, shared: Shared) -> None:
        sparse, window = (branch.out.float() for branch in branches_of(spec, seen, shared))
        gates = torch.tensor([1.0, 0.0], device=sparse.device)  # as if it stood alone
        if layer in before:
            out = mapped(sparse, before[layer])
            best = best_gates(products_of(out, window, seen.out))
            gates = best.view(*out.shape[:3], 2).clamp(min=LEAST_GATE)
        fit = fits.setdefault(layer, MapFit(seen.v.shape[2], seen.v.shape[3]))
        fit.add(gates[..., :1] * sparse, seen.out - gates[..., 1:] * window)

    for row in rows:
        watch_served(model, spec, row, on_served)
        advance()
    return {layer: fit.solve() for layer, fit in fits.items()}
