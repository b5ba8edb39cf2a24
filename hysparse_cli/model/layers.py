"""The sparse attention layer: a dynamic subclass of the stock one, with gates and sinks besides.

It computes the gates from its input, and hands them to ``hysparse_attention`` by a keyword that
the stock layer passes on.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import DynamicSlidingWindowLayer

from hysparse_cli.model.config import HysparseSpec, new_tensors


class GatesAndSinks(nn.Module):
    """The new tensors of a sparse attention layer: gates (eq. 8) and sink biases."""

    def __init__(self, num_heads: int, hidden_size: int, spec: HysparseSpec, own_sinks: bool):
        super().__init__()
        self.start = new_tensors(num_heads, hidden_size, spec, own_sinks=own_sinks)
        self.num_heads = num_heads
        gate = self.start.get("hysparse.gate.weight")
        self.gate = None if gate is None else nn.Linear(hidden_size, gate.shape[0])
        self.sinks = nn.Parameter(torch.empty(self.start["hysparse.sinks"].shape))

    def reset_parameters(self) -> None:
        parameters = dict(self.named_parameters(prefix="hysparse"))
        for name, tensor in self.start.items():
            initialization.constant_(parameters[name], tensor.fill)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor]:
        """Args: hidden_states: (B, T, hidden).

        Returns: gate logits (B, T, H, 2), None with one branch only; sinks (H, branches).
        """
        if self.gate is None:
            return None, self.sinks
        logits = self.gate(hidden_states)
        return logits.reshape(*logits.shape[:-1], self.num_heads, -1), self.sinks


class _SparseAttention:
    """Mixed into a stock attention class to make it a sparse attention layer."""

    hysparse: GatesAndSinks
    layer_idx: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs["branches"] = self.hysparse(hidden_states)
        past = kwargs.get("past_key_values", kwargs.get("layer_past"))
        layers = past.layers if past is not None else []
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if not isinstance(layer, DynamicSlidingWindowLayer):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if not layer.is_initialized:
            _move_length(layer, hidden_states.device)
        output = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        _release_prefill(layer)
        return output


@cache
def sparse_class(stock: Any) -> type[nn.Module]:
    """The sparse attention layer's class made from a stock attention class."""
    return type(f"HySparse{stock.__name__}", (_SparseAttention, stock), {"__module__": __name__})


def _move_length(layer: DynamicSlidingWindowLayer, device: torch.device) -> None:
    """Move the window's length to the GPU ahead of the layer's first update, where transformers
    would wait for all work before it, in every sparse layer of every prefill."""
    if (length := getattr(layer, "_sliding_window_tensor", None)) is not None:
        layer._sliding_window_tensor = length.to(device, non_blocking=True)


def _release_prefill(layer: DynamicSlidingWindowLayer) -> None:
    """Clone the cached window where it is a view that keeps a longer tensor alive."""
    for name in ("keys", "values"):
        held = getattr(layer, name)
        if held.untyped_storage().nbytes() > held.nbytes:
            setattr(layer, name, held.clone())
