"""Runs the dense model and hands each sparse layer what its server would select and share."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.observe import LayerSeen, watch_attention
from hysparse_cli.model.state import Shared
from hysparse_kernels import (
    Attention,
    block_sparse_attention,
    full_attention,
    sliding_window_attention,
)


class BranchOutputs(NamedTuple):
    """Both branches of a sparse layer on dense inputs, without sinks but a family's own."""

    sparse: Attention
    window: Attention


OnServed = Callable[[int, LayerSeen, Shared], None]


def watch_served(model: Any, spec: HysparseSpec, row: Tensor, on_served: OnServed) -> None:
    """Run the dense ``model`` over ``row`` (T,) and call ``on_served`` at each sparse layer."""
    layout = spec.layers
    shared: dict[int, Shared] = {}

    def on_layer(layer: int, seen: LayerSeen) -> None:
        if layout.serves(layer):
            found = full_attention(
                seen.q,
                seen.k,
                seen.v,
                scale=seen.scale,
                softcap=seen.softcap,
                sinks=seen.sinks,
                block_size=spec.block_size,
                top_k_blocks=spec.top_k_blocks,
            )
            assert found.block_idx is not None, "asked for"
            shared.clear()
            shared[layer] = Shared(seen.k, seen.v, found.block_idx)
        elif layer in layout.sparse_layers:
            on_served(layer, seen, shared[layout.server_of(layer)])

    watch_attention(model, row[None], on_layer)


def branches_of(spec: HysparseSpec, seen: LayerSeen, shared: Shared) -> BranchOutputs:
    """What the branches of a sparse layer put out, with the spec's switches."""
    options: dict[str, Any] = {"scale": seen.scale, "softcap": seen.softcap, "sinks": seen.sinks}
    kv = {"own": (seen.k, seen.v), "shared": (shared.k, shared.v)}
    return BranchOutputs(
        block_sparse_attention(
            seen.q,
            *kv[spec.sparse_kv],
            shared.block_idx,
            block_size=spec.block_size,
            **options,
        ),
        sliding_window_attention(
            seen.q, *kv[spec.window_kv], window_tokens=spec.window_tokens, **options
        ),
    )
