"""Makes the ops as they are timed: called by the chosen backend, and the same in eager torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hysparse_kernels as ops
from hysparse_kernels import KeyRange

PER_QUERY = ("q", "gate_logits", "block_idx")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Operation:
    """One op as it is timed: ``call`` by whatever backend is chosen, ``plain`` in eager torch.

    Both take the inputs and what each query sees; ``call`` may take options of the op too. An input
    is by query (``PER_QUERY``), by key, or without a batch, such as sinks.

    name: of the op in ``hysparse_kernels``. block_size: None where it has no blocks.
    """

    name: str
    inputs: Tensors
    seen: KeyRange
    call: Callable[..., Any]
    plain: Callable[[Tensors, KeyRange], Tensor]
    block_size: int | None = None


def full(inputs: Tensors, seen: KeyRange, *, block_size: int, top_k_blocks: int) -> Operation:
    """Full attention over q, k, v; it selects where ``top_k_blocks`` is not 0."""
    size = block_size if top_k_blocks else None

    def call(x: Tensors, seen: KeyRange, **more: Any) -> Any:
        return ops.full_attention(
            *_qkv(x), key_range=seen, block_size=size, top_k_blocks=top_k_blocks, **more
        )

    def plain(x: Tensors, seen: KeyRange) -> Tensor:
        return plain_attention(*_qkv(x), [visible_keys(seen, x["k"])])

    return Operation("full_attention", inputs, seen, call, plain, size)


def block_sparse(inputs: Tensors, seen: KeyRange, *, block_size: int) -> Operation:
    """Block-sparse attention over q, k, v, block_idx."""

    def call(x: Tensors, seen: KeyRange) -> Any:
        return ops.block_sparse_attention(
            *_qkv(x), x["block_idx"], key_range=seen, block_size=block_size
        )

    def plain(x: Tensors, seen: KeyRange) -> Tensor:
        visible = [visible_keys(seen, x["k"]), _listed(x["block_idx"], x["k"], block_size)]
        return plain_attention(*_qkv(x), visible)

    return Operation("block_sparse_attention", inputs, seen, call, plain, block_size)


def window(inputs: Tensors, seen: KeyRange, *, window_tokens: int) -> Operation:
    """Sliding window attention over q, k, v, sinks."""

    def call(x: Tensors, seen: KeyRange) -> Any:
        return ops.sliding_window_attention(
            *_qkv(x), key_range=seen, window_tokens=window_tokens, sinks=x["sinks"]
        )

    def plain(x: Tensors, seen: KeyRange) -> Tensor:
        visible = [visible_keys(seen, x["k"]), _recent(seen, x["k"], window_tokens)]
        return plain_attention(*_qkv(x), visible, x["sinks"])

    return Operation("sliding_window_attention", inputs, seen, call, plain)


def sparse_layer(
    inputs: Tensors,
    seen: KeyRange,
    *,
    block_size: int,
    window_tokens: int,
    window_range: KeyRange | None = None,
) -> Operation:
    """A sparse layer over q, k, v (shared), block_idx, window_k, window_v, gate_logits, sinks.

    window_range: over the layer's own keys where they are not as many as the shared ones.
    """

    def call(x: Tensors, seen: KeyRange) -> Any:
        return ops.sparse_layer_attention(
            *_qkv(x),
            x["block_idx"],
            x["window_k"],
            x["window_v"],
            x["gate_logits"],
            sinks=x["sinks"],
            block_size=block_size,
            window_tokens=window_tokens,
            key_range=seen,
            window_range=window_range or seen,
        )

    def plain(x: Tensors, seen: KeyRange) -> Tensor:
        q, k, v = _qkv(x)
        own, (sparse_sink, window_sink) = window_range or seen, x["sinks"].unbind(-1)
        visible = [visible_keys(seen, k), _listed(x["block_idx"], k, block_size)]
        o_sparse = plain_attention(q, k, v, visible, sparse_sink)
        visible = [visible_keys(own, x["window_k"]), _recent(own, x["window_k"], window_tokens)]
        o_window = plain_attention(q, x["window_k"], x["window_v"], visible, window_sink)
        gates = x["gate_logits"].sigmoid()
        return gates[..., :1] * o_sparse + gates[..., 1:] * o_window

    return Operation("sparse_layer_attention", inputs, seen, call, plain, block_size)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: list[Tensor], sinks: Tensor | None = None
) -> Tensor:
    """Eager attention in the inputs' dtype, softmax in float32, as transformers has it.

    Args: visible: (B, T, G or 1, S) bool, all of which a key must pass. Returns: (B, T, H, D).
    """
    logits = plain_logits(q, k, visible)
    if sinks is not None:
        column = sinks.to(logits.dtype).view(1, 1, k.shape[2], -1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[1]]
    return torch.einsum("btgrs,bsgd->btgrd", weights, v).flatten(2, 3)


def plain_logits(q: Tensor, k: Tensor, visible: list[Tensor]) -> Tensor:
    """Scaled logits (B, T, G, H / G, S) in the inputs' dtype; -inf where a key is not visible."""
    by_group = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits: Tensor = torch.einsum("btgrd,bsgd->btgrs", by_group, k)
    logits = logits * q.shape[-1] ** -0.5
    for mask in visible:
        logits = logits.masked_fill(~mask[:, :, :, None], -torch.inf)
    return logits


def visible_keys(seen: KeyRange, k: Tensor) -> Tensor:
    """(B, T, 1, S) bool: what ``seen`` shows."""
    return seen.sees(_slots(k).expand(1, seen.last.shape[1], -1))[:, :, None]


def _qkv(x: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    return x["q"], x["k"], x["v"]


def _slots(k: Tensor) -> Tensor:
    return torch.arange(k.shape[1], device=k.device)


def _recent(seen: KeyRange, k: Tensor, window_tokens: int) -> Tensor:
    """(B, T, 1, S) bool: what is in the window."""
    return (_slots(k) > seen.last[..., None] - window_tokens)[:, :, None]


def _listed(block_idx: Tensor, k: Tensor, block_size: int) -> Tensor:
    """(B, T, G, S) bool: what is in a listed block."""
    num_blocks = -(-k.shape[1] // block_size)
    listed = torch.zeros(*block_idx.shape[:3], num_blocks + 1, dtype=torch.bool, device=k.device)
    listed.scatter_(-1, block_idx.long().where(block_idx >= 0, num_blocks), True)
    return listed[..., _slots(k) // block_size]
