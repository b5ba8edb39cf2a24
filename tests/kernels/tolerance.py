"""Tests by the law of ``hysparse_kernels.tolerance``, and plain torch to compare with."""

from typing import Any

import torch
from torch import Tensor

from hysparse_kernels import KeyRange, reference
from hysparse_kernels.tolerance import judge


def assert_within_tolerance(
    kernel: Tensor, plain: Tensor, truth: Tensor, *, gradient: bool = False, name: str = "out"
) -> None:
    """Hold ``kernel`` to the law."""
    assert kernel.shape == truth.shape, f"{name}: {tuple(kernel.shape)} for {tuple(truth.shape)}"
    if not truth.numel():
        return
    for error in judge(name, kernel, plain, truth, gradient=gradient):
        assert error.lawful, f"{error}; allowed {error.allowed:.1e}"


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Eager attention in the inputs' dtype, softmax in float32, as transformers has it.

    Args: visible: (B, T, G or 1, S) bool. Returns: (B, T, H, Dv); rows that see nothing are 0.
    """
    G = k.shape[2]
    queries = q.unflatten(2, (G, -1))
    logits = torch.einsum("btgrd,bsgd->btgrs", queries, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible[:, :, :, None], -torch.inf)
    if sinks is not None:
        column = sinks.to(logits.dtype).view(1, 1, G, -1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, column], dim=-1)
    seen = logits.isneginf().all(-1, keepdim=True)
    weights = logits.masked_fill(seen, 0.0).softmax(-1, dtype=torch.float32).to(q.dtype)
    weights = weights.masked_fill(seen, 0.0)[..., : k.shape[1]]
    return torch.einsum("btgrs,bsgd->btgrd", weights, v).flatten(2, 3)


def visible_keys(key_range: KeyRange, num_keys: int) -> Tensor:
    """(B, T, 1, S) bool: what full attention sees."""
    slots = torch.arange(num_keys, device=key_range.last.device)
    return key_range.sees(slots.expand(1, key_range.last.shape[1], -1))[:, :, None]


def visible_window(key_range: KeyRange, num_keys: int, window_tokens: int) -> Tensor:
    """(B, T, 1, S) bool: what sliding window attention sees."""
    slots = torch.arange(num_keys, device=key_range.last.device)
    recent = slots > key_range.last[..., None] - window_tokens
    return visible_keys(key_range, num_keys) & recent[:, :, None]


def visible_blocks(
    key_range: KeyRange, num_keys: int, block_idx: Tensor, block_size: int
) -> Tensor:
    """(B, T, G, S) bool: what block-sparse attention sees."""
    slots = torch.arange(num_keys, device=block_idx.device)
    first = 0 if key_range.first is None else key_range.first[..., None]
    block = ((slots - first) // block_size).expand(*block_idx.shape[:2], -1)[:, :, None]
    chosen = (block[..., None] == block_idx[:, :, :, None].long()).any(-1)
    return visible_keys(key_range, num_keys) & chosen


def truth_of(op: str, *args: Any, **options: Any) -> Any:
    """The reference's op on inputs widened to float64, floating options too."""
    wide = [_wide(x) for x in args]
    return getattr(reference, op)(*wide, **{name: _wide(x) for name, x in options.items()})


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
