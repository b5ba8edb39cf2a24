"""The two attention functions that transformers' stock layers call: HySparse's and the dense one.

The stock layer projects, normalises, rotates and updates the cache; then it calls its attention
function through transformers' AttentionInterface. Both functions make a ``LayerCall`` of what they
get, and let the forward's observer run it, where there is one.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import AttentionInterface

from hysparse_cli.model.gates import Gate
from hysparse_cli.model.kinds import FULL, Kind
from hysparse_cli.model.state import ForwardOptions, ForwardState, Shared
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
DENSE_NAME = "hysparse_dense"


@dataclass(eq=False)
class LayerCall:
    """One layer's attention in one forward: what it is given, and the ways to attend.

    layer: its index. q: (B, T, H, D). k: (B, S, G, D), v: (B, S, G, Dv), after the cache's update.
    scale, softcap, sinks (H,), window_tokens: the dense layer's own; None where it has none.
    key_range: what each query sees; None in a dense model whose rows are whole. state: the HySparse
    forward's, None in a dense model. branches: a sparse layer's gate logits and sinks, as
    GatesAndSinks gives them; None in other layers.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    window_tokens: int | None = None
    key_range: KeyRange | None = None
    state: ForwardState | None = None
    branches: tuple[Tensor | None, Tensor] | None = None

    def replace(self, **changes: Any) -> "LayerCall":
        """The same call with other fields."""
        return dataclasses.replace(self, **changes)

    def attend(self) -> Tensor:
        """The layer's attention, (B, T, H, Dv).

        Raises: ValueError where the keys are not those of the forward's state.
        """
        return self.dense() if self.state is None else self.kind.attend(self)

    @property
    def kind(self) -> Kind:
        """How the layer attends in this forward of a HySparse model."""
        if self.branches is None or self._forward.attends_in_full(self.layer):
            return FULL
        return self._forward.spec.kind

    @property
    def is_learned(self) -> bool:
        """Whether gates and sinks are used in this forward."""
        variation = self._forward.variation
        return variation is None or variation.learned

    @property
    def shared(self) -> Shared:
        """What the full layer that serves this sparse one has published."""
        return self._forward.shared_by(self._forward.spec.layers.server_of(self.layer))

    @property
    def block_idx(self) -> Tensor | None:
        """(B, T, G, K) blocks that a sparse layer reads, or that a full layer has selected once it
        has attended; None where nothing is selected."""
        if self.state is None or not self.state.spec.selects:
            return None
        if self.kind.selects or self._serves:
            return self.shared.block_idx
        return None

    @property
    def gates(self) -> Tensor | None:
        """(B, T, H, 2) weights of both branches; None where there are no gates."""
        if self.state is None or self.kind.gate is None:
            return None
        logits, _ = self._branches
        assert logits is not None, "two branches have gates"
        return self._gate.weights(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    @property
    def branch_sinks(self) -> Tensor:
        """(H, branches) learned sinks, the family's own added."""
        _, sinks = self._branches
        return sinks if self.sinks is None else sinks + self.sinks[:, None]

    def dense(self) -> Tensor:
        """Causal attention of a dense layer; PyTorch's own where that computes the same."""
        options = self._options | {"sinks": self.sinks, "key_range": self.key_range}
        window = self.window_tokens
        if window is not None and window < self.k.shape[1]:
            return sliding_window_attention(
                self.q, self.k, self.v, window_tokens=window, **options
            ).out
        if any(x is not None for x in (self.key_range, self.softcap, self.sinks)):
            return full_attention(self.q, self.k, self.v, **options).out
        by_head = (self.q.transpose(1, 2), self.k.transpose(1, 2), self.v.transpose(1, 2))
        out = scaled_dot_product_attention(
            *by_head, is_causal=self.q.shape[1] > 1, scale=self.scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()

    def full(self) -> Tensor:
        """All keys of the layer; publishes its selection where it serves sparse layers."""
        state, spec, serves = self._forward, self._forward.spec, self._serves
        if self.k.shape[1] != state.num_keys:
            raise ValueError(
                f"layer {self.layer} sees {self.k.shape[1]} keys where {state.num_keys} are cached "
                "and new: gradient checkpointing drops a cache, use one or the other"
            )
        result = full_attention(
            self.q,
            self.k,
            self.v,
            key_range=state.key_range,
            sinks=self.sinks,
            block_size=spec.block_size if serves else None,
            top_k_blocks=spec.top_k_blocks if serves else 0,
            **self._options,
        )
        if result.block_idx is not None:
            block_idx = state.with_forced(self.layer, result.block_idx)
            state.publish(self.layer, Shared(self.k, self.v, block_idx))
        return result.out

    def block_sparse(self, sinks: Tensor | None) -> Attention:
        """The block-sparse branch, with a sink for each head (H,), or none."""
        k, v, _ = self._keys(self._forward.spec.sparse_kv)
        return block_sparse_attention(
            self.q,
            k,
            v,
            self.shared.block_idx,
            block_size=self._forward.spec.block_size,
            key_range=self._forward.key_range,
            sinks=sinks,
            **self._options,
        )

    def window(self, sinks: Tensor | None) -> Attention:
        """The SWA branch, with a sink for each head (H,), or none."""
        k, v, key_range = self._keys(self._forward.spec.window_kv)
        return sliding_window_attention(
            self.q,
            k,
            v,
            window_tokens=self._forward.spec.window_tokens,
            key_range=key_range,
            sinks=sinks,
            **self._options,
        )

    def gated(self) -> Tensor:
        """The gated sum of both branches, by the fused kernels where they have the gate."""
        spec, (gate_logits, _) = self._forward.spec, self._branches
        if not self._gate.fused:
            weights, sinks = self.gates, self.branch_sinks
            assert weights is not None, "two branches have gates"
            sparse, window = self.block_sparse(sinks[:, 0]).out, self.window(sinks[:, 1]).out
            total = weights[..., :1] * sparse + weights[..., 1:] * window
            return total.to(self.v.dtype)
        assert gate_logits is not None, "two branches have gates"
        k, v, _ = self._keys(spec.sparse_kv)
        window_k, window_v, window_range = self._keys(spec.window_kv)
        return sparse_layer_attention(
            self.q,
            k,
            v,
            self.shared.block_idx,
            window_k,
            window_v,
            gate_logits,
            block_size=spec.block_size,
            window_tokens=spec.window_tokens,
            sinks=self.branch_sinks,
            key_range=self._forward.key_range,
            window_range=window_range,
            **self._options,
        )

    def one_softmax(self) -> Tensor:
        """Both branches as one softmax over their keys, a family's own sinks in it once."""
        sparse, window = self.block_sparse(self.sinks), self.window(None)
        difference = sparse.lse - window.lse
        return gated_sum(sparse.out, window.out, torch.stack([difference, -difference], -1))

    @property
    def _forward(self) -> ForwardState:
        assert self.state is not None, "of a HySparse model"
        return self.state

    @property
    def _branches(self) -> tuple[Tensor | None, Tensor]:
        assert self.branches is not None, "of a sparse layer"
        return self.branches

    @property
    def _gate(self) -> Gate:
        assert self.kind.gate is not None, "two branches have gates"
        return self.kind.gate

    @property
    def _serves(self) -> bool:
        """Whether this is a full layer that selects blocks for sparse ones."""
        spec = self._forward.spec
        return spec.selects and spec.layers.serves(self.layer)

    @property
    def _options(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap}

    def _keys(self, whose: str) -> tuple[Tensor, Tensor, KeyRange]:
        """Keys, values and their range: the server's, or the layer's own as its cache has them."""
        if whose == "own":
            return self.k, self.v, self._forward.window_range
        return self.shared.k, self.shared.v, self._forward.key_range


Observer = Callable[[LayerCall], Tensor]


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
    call = LayerCall(
        module.layer_idx,
        *_by_token(query, key, value),
        scaling,
        softcap,
        s_aux,
        state=hysparse,
        branches=branches,
    )
    with torch.autocast(query.device.type, enabled=False):
        return _run(call, hysparse.options), None


def dense_attention(
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
    hysparse: ForwardOptions | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for dense models that are observed, or read split rows.

    It has no mask function of its own, so that transformers makes no mask: rows are whole texts,
    without padding, or what the options' rows say. It drops nothing out.

    Args: as of ``hysparse_attention``; sliding_window: in tokens, or None. hysparse: what the
        forward was asked for besides its inputs.
    Returns: (B, T, H, Dv), and no attention weights.
    """
    options = hysparse or ForwardOptions()
    call = LayerCall(
        module.layer_idx,
        *_by_token(query, key, value),
        scaling,
        softcap,
        s_aux,
        sliding_window,
        key_range=None if options.rows is None else options.rows.key_range,
    )
    return _run(call, options), None


def _by_token(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, tokens before heads, in one dtype."""
    v = value.transpose(1, 2)
    return query.transpose(1, 2).to(v.dtype), key.transpose(1, 2).to(v.dtype), v


def _run(call: LayerCall, options: ForwardOptions) -> Tensor:
    return call.attend() if options.observer is None else options.observer(call)


AttentionInterface.register(ATTENTION_NAME, hysparse_attention)
AttentionInterface.register(DENSE_NAME, dense_attention)
