"""HySparse's attention, called by the stock attention layers of a transformers model.

The stock layer projects, normalises, rotates and updates the cache; then it calls
``hysparse_attention`` through transformers' AttentionInterface. A sparse attention layer is a
dynamic subclass of its stock class that first computes the gates from its input.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import DynamicSlidingWindowLayer

from hysparse_cli.model.config import HysparseSpec, new_tensors
from hysparse_cli.model.state import ForwardState, Shared
from hysparse_kernels import (
    Attention,
    KeyRange,
    block_sparse_attention,
    full_attention,
    gated_sum,
    sliding_window_attention,
    sparse_layer_attention,
)

ATTENTION_NAME = "hysparse"


class GatesAndSinks(nn.Module):
    """What a sparse attention layer adds to the dense one: gates (eq. 8) and sink biases."""

    def __init__(self, num_heads: int, hidden_size: int, spec: HysparseSpec, own_sinks: bool):
        super().__init__()
        self.start = new_tensors(num_heads, hidden_size, spec, own_sinks=own_sinks)
        self.gate = nn.Linear(hidden_size, 2 * num_heads) if spec.num_branches == 2 else None
        self.sinks = nn.Parameter(torch.empty(num_heads, spec.num_branches))

    def reset_parameters(self) -> None:
        parameters = dict(self.named_parameters(prefix="hysparse"))
        for name, tensor in self.start.items():
            initialization.constant_(parameters[name], tensor.fill)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor]:
        """Args: hidden_states: (B, T, hidden).

        Returns: gate logits (B, T, H, 2), None with one branch alone; sinks (H, branches).
        """
        if self.gate is None:
            return None, self.sinks
        logits = self.gate(hidden_states)
        return logits.reshape(*logits.shape[:-1], -1, 2), self.sinks


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


def hysparse_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    hysparse: ForwardState | None = None,
    branches: tuple[Tensor | None, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for HySparse models.

    Args:
        query: (B, H, T, D). key: (B, G, S, D), after the cache's update. value: (B, G, S, Dv).
        attention_mask: unused: ``hysparse`` knows which keys each query sees.
        s_aux: (H,), the family's own sinks (gpt_oss), or None.
        hysparse: this forward's state. branches: a sparse layer's gate logits and sinks.
    Returns: (B, T, H, Dv), and no attention weights: no map of them is ever built.
    Raises: ValueError where dropout is not 0, or keys don't match the state.
    """
    if hysparse is None:
        raise ValueError("HySparse attention runs inside a HySparse model only")
    if dropout:
        raise ValueError(
            f"attention_dropout is {dropout}: HySparse attention has none, set it to 0"
        )
    v = value.transpose(1, 2)
    q, k = query.transpose(1, 2).to(v.dtype), key.transpose(1, 2).to(v.dtype)
    call = _Call(module.layer_idx, q, k, v, scaling, softcap, s_aux, hysparse)
    with torch.autocast(query.device.type, enabled=False):
        if branches is None or hysparse.attends_in_full(module.layer_idx):
            return call.full(), None
        return call.sparse(*branches), None


class _Call:
    """One layer's attention: its inputs, and the two ways to attend."""

    def __init__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        softcap: float | None,
        own_sinks: Tensor | None,
        state: ForwardState,
    ):
        self.layer, self.q, self.k, self.v = layer, q, k, v
        self.own_sinks, self.state = own_sinks, state
        self.options: dict[str, Any] = {"scale": scale, "softcap": softcap}

    def full(self) -> Tensor:
        state, spec = self.state, self.state.spec
        if self.k.shape[1] != state.num_keys:
            raise ValueError(
                f"layer {self.layer} sees {self.k.shape[1]} keys where {state.num_keys} are cached "
                "and new: gradient checkpointing drops a cache, use one or the other"
            )
        serves = spec.selects and spec.layers.serves(self.layer)
        result = full_attention(
            self.q,
            self.k,
            self.v,
            key_range=state.key_range,
            sinks=self.own_sinks,
            block_size=spec.block_size if serves else None,
            top_k_blocks=spec.top_k_blocks if serves else 0,
            **self.options,
        )
        if result.block_idx is not None:
            block_idx = state.with_forced(self.layer, result.block_idx)
            state.publish(self.layer, Shared(self.k, self.v, block_idx))
        self._observe(result.block_idx, None)
        return result.out

    def sparse(self, gate_logits: Tensor | None, sinks: Tensor) -> Tensor:
        state, spec = self.state, self.state.spec
        if self.own_sinks is not None:
            sinks = sinks + self.own_sinks[:, None]
        if not spec.selects:
            self._observe(None, None)
            return self._window(None, sinks[:, 0]).out
        shared = state.shared_by(spec.layers.server_of(self.layer))
        self._observe(shared.block_idx, gate_logits)
        if state.variation is not None and not state.variation.learned:
            return self._merged(shared)
        if spec.window_kv == "none":
            return self._block_sparse(shared, sinks[:, 0]).out
        assert gate_logits is not None, "two branches have gates"
        k, v, _ = self._keys_of(shared if spec.sparse_kv == "shared" else None)
        window_k, window_v, window_range = self._keys_of(
            shared if spec.window_kv == "shared" else None
        )
        return sparse_layer_attention(
            self.q,
            k,
            v,
            shared.block_idx,
            window_k,
            window_v,
            gate_logits,
            block_size=spec.block_size,
            window_tokens=spec.window_tokens,
            sinks=sinks,
            key_range=state.key_range,
            window_range=window_range,
            **self.options,
        )

    def _keys_of(self, shared: Shared | None) -> tuple[Tensor, Tensor, KeyRange]:
        """Keys, values and their range: the server's, or the layer's own as its cache has them."""
        if shared is None:
            return self.k, self.v, self.state.window_range
        return shared.k, shared.v, self.state.key_range

    def _block_sparse(self, shared: Shared, sinks: Tensor | None) -> Attention:
        spec = self.state.spec
        k, v, _ = self._keys_of(shared if spec.sparse_kv == "shared" else None)
        return block_sparse_attention(
            self.q,
            k,
            v,
            shared.block_idx,
            block_size=spec.block_size,
            key_range=self.state.key_range,
            sinks=sinks,
            **self.options,
        )

    def _window(self, shared: Shared | None, sinks: Tensor | None) -> Attention:
        k, v, key_range = self._keys_of(shared)
        return sliding_window_attention(
            self.q,
            k,
            v,
            window_tokens=self.state.spec.window_tokens,
            key_range=key_range,
            sinks=sinks,
            **self.options,
        )

    def _merged(self, shared: Shared) -> Tensor:
        """Both branches as one softmax over their keys, a family's own sinks in it once."""
        spec = self.state.spec
        sparse = self._block_sparse(shared, self.own_sinks)
        if spec.window_kv == "none":
            return sparse.out
        window = self._window(shared if spec.window_kv == "shared" else None, None)
        difference = sparse.lse - window.lse
        return gated_sum(sparse.out, window.out, torch.stack([difference, -difference], -1))

    def _observe(self, block_idx: Tensor | None, gate_logits: Tensor | None) -> None:
        if self.state.observer is None:
            return
        self.state.observer(
            layer=self.layer,
            q=self.q,
            k=self.k,
            v=self.v,
            key_range=self.state.key_range,
            sinks=self.own_sinks,
            block_idx=block_idx,
            gates=None if gate_logits is None else gate_logits.float().sigmoid(),
            **self.options,
        )
