"""Lets an observer run each attention layer of a forward: to record it, to time it, to check it.

An observer is called with each layer's ``LayerCall``, in order, in place of its attention; it
returns ``call.attend()``. The tensors are not copies, and all layers together may not fit in
memory: keep what you need.

Shape suffixes as in hysparse_kernels.reference: B batch, T tokens, H query heads, G KV heads,
D head dim.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hysparse_cli.families import family_of
from hysparse_cli.model.attention import ATTENTION_NAME, DENSE_NAME, LayerCall, Observer
from hysparse_cli.model.logits import hidden_states
from hysparse_cli.model.state import ForwardOptions


class LayerSeen(NamedTuple):
    """One attention layer of a dense forward.

    x: (B, T, hidden), the attention module's input. residual: (B, T, hidden), the decoder layer's.
    q: (B, T, H, D), k: (B, T, G, D), v: (B, T, G, Dv), after norm and RoPE. out: (B, T, H, Dv),
    before the output projection. softcap and sinks (H,): None where the layer has none.
    """

    x: Tensor
    residual: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None


OnLayer = Callable[[int, LayerSeen], None]


@torch.no_grad()
def observe(model: Any, input_ids: Tensor, observer: Observer) -> Tensor:
    """Run a transformers model, dense or HySparse, over ``input_ids`` (B, T) under ``observer``.

    Args:
        model: in eval mode; it is left as it was. A dense one attends by ``dense_attention``: rows
            are whole, without padding or packing.
    Returns: (B, T, hidden), what the language model's head reads.
    """
    with _observable(model):
        options = ForwardOptions(observer=observer)
        return hidden_states(model, input_ids.to(model.device), hysparse=options)


def watch_attention(model: Any, input_ids: Tensor, on_layer: OnLayer) -> Tensor:
    """``observe`` a dense model of a supported family, with what goes into each layer.

    Args:
        on_layer: called with each layer's index and what was seen there, in order.
    """
    family = family_of(model.config.model_type)
    entered: dict[str, Tensor] = {}  # by module path, of the layer that runs

    def record(call: LayerCall) -> Tensor:
        out = call.attend()
        layer, x = (path.format(layer=call.layer) for path in (family.layer, family.attention))
        seen = LayerSeen(
            entered.pop(x),
            entered.pop(layer),
            call.q,
            call.k,
            call.v,
            out,
            call.scale,
            call.softcap,
            call.sinks,
        )
        on_layer(call.layer, seen)
        return out

    with ExitStack() as stack:
        for layer in range(model.config.num_hidden_layers):
            for path in (family.layer.format(layer=layer), family.attention.format(layer=layer)):
                hook = _note_input(entered, path)
                module: nn.Module = model.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return observe(model, input_ids, record)


def _note_input(entered: dict[str, Tensor], path: str) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[path] = args[0] if args else kwargs["hidden_states"]

    return note


@contextmanager
def _observable(model: Any) -> Iterator[None]:
    """Let a dense model attend by ``dense_attention``."""
    before = model.config._attn_implementation
    if before == ATTENTION_NAME:
        yield
        return
    model.set_attn_implementation(DENSE_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
