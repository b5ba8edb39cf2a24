"""``--init copy``: each sparse layer keeps its own q, k, v and o; its gates are measured."""

from typing import Any

import torch
from torch import Tensor

from hysparse_cli.calibrate.watch import LayerSeen
from hysparse_cli.families import family_of
from hysparse_cli.init.gates import Products, fit_gates, fit_of, products_of
from hysparse_cli.init.served import branches_of, watch_served
from hysparse_cli.init.start import LayerFit, OnProgress, Start
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.state import Shared


@torch.no_grad()
def copy(model: Any, spec: HysparseSpec, rows: Tensor, on_progress: OnProgress) -> Start:
    """Fit the gates of each sparse layer to the dense layer's output, on dense inputs.

    Sinks stay off: they normalise as the gates do, and both would do it twice. The inputs of all
    sparse layers are kept in memory, in the model's dtype.

    Args:
        model: dense, in eval mode. rows: (N, T) int64, calibration text.
        on_progress: is told rows and layers done, and how many there are.
    """
    path = family_of(model.config.model_type).attention
    x: dict[int, list[Tensor]] = {layer: [] for layer in spec.layers.sparse_layers}
    products: dict[int, list[Products]] = {layer: [] for layer in spec.layers.sparse_layers}

    def on_served(layer: int, seen: LayerSeen, shared: Shared) -> None:
        own = Shared(seen.k, seen.v, shared.block_idx)
        branches = branches_of(spec, seen.q, own, shared, seen)
        x[layer].append(seen.x.flatten(0, 1).cpu())
        found = products_of(branches.sparse.out, branches.window.out, seen.out)
        products[layer].append(Products(*(product.cpu() for product in found)))

    steps = len(rows) + len(x)
    for r, row in enumerate(rows):
        on_progress(r, steps)
        watch_served(model, spec, row, on_served)
    tensors: dict[str, Tensor] = {}
    fits: dict[int, LayerFit] = {}
    for i, layer in enumerate(x):
        on_progress(len(rows) + i, steps)
        inputs = torch.cat(x[layer]).to(model.device).float()
        joined = Products(
            *(torch.cat(parts).to(model.device) for parts in zip(*products[layer], strict=True))
        )
        gates = fit_gates(inputs, joined)
        name = f"{path.format(layer=layer)}.hysparse.gate"
        tensors |= {f"{name}.weight": gates.weight.cpu(), f"{name}.bias": gates.bias.cpu()}
        fits[layer] = fit_of(inputs, joined, gates)
    on_progress(steps, steps)
    return Start(tensors, fits)
