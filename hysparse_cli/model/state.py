"""Carries what one forward pass has from layer to layer: key ranges, and what full layers share.

It travels as the keyword argument ``hysparse``, which stock layers hand through. Neither module
attributes nor context variables would do: with two forwards before a backward, or under
checkpointing, they silently give wrong gradients.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hysparse_cli.model.config import HysparseSpec
from hysparse_kernels import KeyRange

if TYPE_CHECKING:
    from hysparse_cli.model.attention import Observer
    from hysparse_cli.model.context_parallel import SplitRows


class Shared(NamedTuple):
    """What a full attention layer serves: k, v (B, S, G, D) and block_idx (B, T, G, K)."""

    k: Tensor
    v: Tensor
    block_idx: Tensor


class Variation(NamedTuple):
    """One forward without a cache that departs from the model's config.

    spec: the model's, with other switches. sparse_layers: the sparse layers that are sparse; the
    others attend in full to their own keys. learned: whether gates and sinks are used; without them
    both branches are merged as one softmax over the keys of both (a key in both counts twice).
    forced_blocks: full layer -> blocks that each of its selections has besides those it chose, for
    the queries that see them.
    """

    spec: HysparseSpec
    sparse_layers: frozenset[int]
    learned: bool
    forced_blocks: Mapping[int, Sequence[int]] = MappingProxyType({})


class ForwardOptions:
    """``model(..., hysparse=ForwardOptions(...))``: what a forward is asked for besides its inputs.

    observer: called in place of each layer's attention with its ``LayerCall``; returns the output,
    as ``call.attend()`` gives it. variation: of a HySparse model. rows: the whole rows of which the
    inputs are this process's share (context_parallel.py).
    """

    def __init__(
        self,
        *,
        observer: "Observer | None" = None,
        variation: Variation | None = None,
        rows: "SplitRows | None" = None,
    ):
        self.observer, self.variation, self.rows = observer, variation, rows


class ForwardState:
    """One forward's state: no dataclass, of which FSDP2 would hand each layer a copy of its own.

    ``key_range`` is over the ``num_keys`` keys of a full layer, ``window_range`` over the keys that
    a sparse layer's own cache hands out. ``spec`` is the variation's where there is one.
    """

    def __init__(
        self,
        spec: HysparseSpec,
        num_keys: int,
        key_range: KeyRange,
        window_range: KeyRange,
        options: ForwardOptions | None = None,
    ):
        self.options = options or ForwardOptions()
        self.variation = self.options.variation
        self.spec = spec if self.variation is None else self.variation.spec
        self.num_keys, self.key_range, self.window_range = num_keys, key_range, window_range
        self.grad_enabled = torch.is_grad_enabled()
        self._shared: dict[int, Shared] = {}

    def attends_in_full(self, sparse_layer: int) -> bool:
        """Whether this forward's variation makes a sparse layer attend to all of its own keys."""
        return self.variation is not None and sparse_layer not in self.variation.sparse_layers

    def with_forced(self, full_layer: int, block_idx: Tensor) -> Tensor:
        """A selection (B, T, G, K) and the blocks that this forward's variation forces into it."""
        forced = self.variation.forced_blocks.get(full_layer, ()) if self.variation else ()
        for block in forced:
            first = 0 if self.key_range.first is None else self.key_range.first
            seen = first + block * self.spec.block_size <= self.key_range.last  # [B or 1, T]
            is_new = seen[..., None] & (block_idx != block).all(-1)
            more = torch.where(is_new, block, -1).to(block_idx.dtype)
            block_idx = torch.cat([block_idx, more[..., None]], -1)
        return block_idx

    def publish(self, full_layer: int, shared: Shared) -> None:
        """Hand a full layer's keys, values and selection to the layers it serves.

        A recompute under gradient checkpointing publishes again: the first stays, since the served
        layers' graphs hang on it. Without gradients the block before is dropped, to free memory.

        Raises: RuntimeError under reentrant checkpointing, whose gradients would be wrong.
        """
        if self.grad_enabled and not torch.is_grad_enabled():
            raise RuntimeError(
                "HySparse needs gradient checkpointing with use_reentrant=False: reentrant "
                "checkpointing would cut the gradient of the shared keys and values"
            )
        if full_layer in self._shared:
            return
        if not self.grad_enabled:
            self._shared.clear()
        self._shared[full_layer] = shared

    def shared_by(self, full_layer: int) -> Shared:
        return self._shared[full_layer]


def padding_mask(attention_mask: Any) -> Tensor | None:
    """A forward's attention_mask as (B, keys so far) bool: it may be a dict of masks by layer type.

    Raises: ValueError on a 4D mask.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: HySparse selects blocks for "
            "causal attention and takes a (batch, keys) mask of 0 and 1"
        )
    mask: Tensor = attention_mask.bool()
    return mask


def forward_state(
    spec: HysparseSpec,
    inputs: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Any,
    options: ForwardOptions | None = None,
) -> ForwardState:
    """The state of a forward over ``inputs``: (B, T) ids or (B, T, hidden) embeddings.

    Args:
        mask: (B, keys so far), False for padding; or None.
        position_ids: (B or 1, T); where they restart, with neither mask nor cache, documents are
            packed, as transformers has it.
        past_key_values: transformers' Cache before this forward, or None.
    Raises: ValueError where the mask does not cover the cached and the new tokens.
    """
    T, device = inputs.shape[1], inputs.device
    offset: int | Tensor = 0
    num_keys, window_keys, window_offset = T, T, 0
    if past_key_values is not None:
        offset = past_key_values.get_query_offset(0)
        num_keys, _ = past_key_values.get_mask_sizes(T, 0)
        first_sparse = spec.layers.sparse_layers[0]
        window_keys, window_offset = past_key_values.get_mask_sizes(T, first_sparse)
    if isinstance(offset, Tensor):
        offset = offset.to(device)
    elif mask is not None and mask.shape[1] != offset + T:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but there are {offset} cached and {T} "
            "new ones: it must cover both"
        )
    last = (torch.arange(T, device=device) + offset)[None]

    first: Tensor | None = None
    if mask is not None:
        first, mask = _from_mask(mask.to(device), num_keys, T)
    elif position_ids is not None and past_key_values is None:
        first = document_starts(position_ids)
    plain = first is None and mask is None
    diagonal = offset if plain and not isinstance(offset, Tensor) else None
    whole = KeyRange(first, last, mask, diagonal)
    window = _window(whole, window_keys, window_offset)
    return ForwardState(spec, num_keys, whole, window, options)


def _from_mask(
    mask: Tensor, num_keys: int, num_queries: int
) -> tuple[Tensor | None, Tensor | None]:
    """First key of each query, and the mask where there are holes or right padding besides."""
    first = mask.long().argmax(1, keepdim=True)
    slots = torch.arange(mask.shape[1], device=mask.device)
    remaining: Tensor | None = torch.nn.functional.pad(
        mask, (0, num_keys - mask.shape[1]), value=True
    )
    if not torch.compiler.is_compiling():
        if bool((mask == (slots >= first)).all()):
            remaining = None
        if not bool(first.any()):
            return None, remaining
    return first.expand(-1, num_queries), remaining


def document_starts(position_ids: Tensor) -> Tensor | None:
    """(B, T) slot of the first token of each query's document; None where none is packed."""
    slots = torch.arange(position_ids.shape[1], device=position_ids.device)
    restarts = torch.zeros_like(position_ids, dtype=torch.bool)
    restarts[:, 1:] = position_ids.diff(dim=1) != 1
    if not torch.compiler.is_compiling() and not bool(restarts.any()):
        return None
    return torch.where(restarts, slots, 0).cummax(1).values


def _window(whole: KeyRange, num_keys: int, offset: int) -> KeyRange:
    """``whole`` as seen from a cache layer that holds ``num_keys`` keys from slot ``offset`` on."""
    if offset == 0 and (whole.mask is None or whole.mask.shape[1] == num_keys):
        return whole
    first = None if whole.first is None else whole.first - offset
    mask = whole.mask
    if mask is not None:
        mask = mask[:, offset : offset + num_keys]
        mask = torch.nn.functional.pad(mask, (0, num_keys - mask.shape[1]), value=True)
    diagonal = None if whole.diagonal is None else whole.diagonal - offset
    return KeyRange(first, whole.last - offset, mask, diagonal)
