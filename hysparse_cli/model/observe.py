"""Looking into a dense model's attention layers while it runs, one layer at a time.

Shape suffixes as in hysparse_kernels.reference: B batch, T tokens, H query heads, G KV heads,
D head dim.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hysparse_cli.families import family_of
from hysparse_cli.model.logits import hidden_states
from hysparse_kernels import full_attention, sliding_window_attention

WATCHED = "hysparse_watched"


class LayerSeen(NamedTuple):
    """One attention layer of a dense forward.

    x: (B, T, hidden), the attention module's input. residual: (B, T, hidden), the decoder layer's.
    q: (B, T, H, D), k: (B, T, G, D), v: (B, T, G, Dv), after norm and RoPE. out: (B, T, H, Dv),
    before the output projection. softcap, sinks (H,) and window_tokens: None where the layer has
    none.
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
    window_tokens: int | None


OnLayer = Callable[[int, LayerSeen], None]


@torch.no_grad()
def watch_attention(model: Any, input_ids: Tensor, on_layer: OnLayer) -> Tensor:
    """Run a dense transformers model over ``input_ids`` (B, T), without padding or packing.

    Args:
        model: of a supported family, in eval mode; it is left as it was.
        on_layer: called with each layer's index and what was seen there, in order. Keep what you
            need: the tensors are not copies, and all layers together may not fit in memory.
    Returns: (B, T, hidden), what the language model's head reads.
    """
    watch = _Watch(on_layer)
    with _installed(model, watch):
        return hidden_states(model, input_ids.to(model.device), hysparse_watch=watch)


class _Watch:
    """Puts together what two hooks and the attention function see of a layer."""

    def __init__(self, on_layer: OnLayer):
        self.on_layer = on_layer
        self.residual: Tensor | None = None
        self.x: Tensor | None = None

    def enter_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.residual = _hidden(args, kwargs)

    def enter_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.x = _hidden(args, kwargs)


def _watched_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    hysparse_watch: _Watch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function of a watched model; arguments as ``hysparse_attention``."""
    watch = hysparse_watch
    assert watch is not None and watch.x is not None and watch.residual is not None
    v = value.transpose(1, 2)
    q, k = query.transpose(1, 2).to(v.dtype), key.transpose(1, 2).to(v.dtype)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if sliding_window is not None:
        out = sliding_window_attention(q, k, v, window_tokens=sliding_window, **options).out
    elif softcap is not None or s_aux is not None:
        out = full_attention(q, k, v, **options).out
    else:  # PyTorch's own is the fastest on a CPU
        by_head = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out = scaled_dot_product_attention(
            *by_head, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
    seen = LayerSeen(watch.x, watch.residual, q, k, v, out, scaling, softcap, s_aux, sliding_window)
    watch.on_layer(module.layer_idx, seen)
    return out, None


def _no_mask(**kwargs: Any) -> None:
    """transformers' mask function of a watched model: rows are whole, attention is causal."""


AttentionInterface.register(WATCHED, _watched_attention)
AttentionMaskInterface.register(WATCHED, _no_mask)


@contextmanager
def _installed(model: Any, watch: _Watch) -> Iterator[None]:
    family = family_of(model.config.model_type)
    before = model.config._attn_implementation
    with ExitStack() as stack:
        for layer in range(model.config.num_hidden_layers):
            path = family.attention.format(layer=layer)
            modules = (
                (path.rpartition(".")[0], watch.enter_layer),
                (path, watch.enter_attention),
            )
            for name, hook in modules:
                module: nn.Module = model.get_submodule(name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        model.set_attn_implementation(WATCHED)
        stack.callback(model.set_attn_implementation, before)
        yield


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
