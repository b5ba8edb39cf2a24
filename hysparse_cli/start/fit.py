"""Fits the gates of all sparse layers, in one pass over the calibration text."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.families import family_of
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.observe import LayerSeen
from hysparse_cli.model.state import Shared
from hysparse_cli.start.gates import Products, fit_gates, fit_of, products_of
from hysparse_cli.start.heads import Order, reordered
from hysparse_cli.start.result import LayerStart, Start
from hysparse_cli.start.server_outputs import branches_of, watch_served
from hysparse_cli.start.values import mapped


@torch.no_grad()
def fit_all_gates(
    model: Any,
    spec: HysparseSpec,
    rows: Tensor,
    orders: Mapping[int, Order],
    maps: Mapping[int, Tensor],
    advance: Callable[[], None],
) -> Start:
    """Fit the gates of each sparse layer to the dense layer's output, on dense inputs.

    Sinks stay off: they normalise as the gates do, and both would do it twice. The inputs of all
    sparse layers are kept in memory, in the model's dtype.

    Args:
        model: dense, in eval mode. rows: (N, T) int64, calibration text.
        orders, maps: of each sparse layer, the order of its KV heads and the maps (G, D, D) of its
            block-sparse branch's output; both empty where it stays as it is.
        advance: is called after each row, and after each sparse layer.
    """
    path, gate = family_of(model.config.model_type).attention, spec.kind.gate
    assert gate is not None, "only layers with gates have a start to fit"
    x: dict[int, list[Tensor]] = {layer: [] for layer in spec.layers.sparse_layers}
    plain: dict[int, list[Products]] = {layer: [] for layer in x}
    with_maps: dict[int, list[Products]] = {layer: [] for layer in x}

    def on_served(layer: int, seen: LayerSeen, shared: Shared) -> None:
        sparse, window = branches_of(spec, seen, shared)
        x[layer].append(seen.x.flatten(0, 1).cpu())
        plain[layer].append(products_of(sparse.out, window.out, seen.out).cpu())
        if layer in maps:
            seen = reordered(seen, orders[layer])
            sparse, window = branches_of(spec, seen, shared)
            out = mapped(sparse.out, maps[layer])
            with_maps[layer].append(products_of(out, window.out, seen.out).cpu())

    for row in rows:
        watch_served(model, spec, row, on_served)
        advance()
    tensors: dict[str, Tensor] = {}
    fits: dict[int, LayerStart] = {}
    for layer, inputs in x.items():
        features = torch.cat(inputs).to(model.device).float()
        copied = Products.joined(plain[layer]).to(model.device)
        ours = Products.joined(with_maps[layer]).to(model.device) if layer in maps else copied
        gates = fit_gates(features, ours, gate)
        name = f"{path.format(layer=layer)}.hysparse.gate"
        tensors |= {f"{name}.weight": gates.weight.cpu(), f"{name}.bias": gates.bias.cpu()}
        fits[layer] = fit_of(features, copied, ours, gates)
        advance()
    return Start(tensors, fits)
