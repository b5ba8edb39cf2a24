"""Results of torch.library ops: none may be None, so an empty tensor stands for what is absent."""

import torch
from torch import Tensor


def given(x: Tensor | None, like: Tensor) -> Tensor:
    """``x``, or an empty tensor where it is None."""
    return like.new_empty(0) if x is None else x


def present(x: Tensor, source: Tensor | None) -> Tensor | None:
    """``x``, the gradient of ``source``, or None where there is no source."""
    return None if source is None else x


def attention_shapes(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of q (B, T, H, D) and v (B, S, G, Dv): out (B, T, H, Dv) and lse (B, T, H), unfilled."""
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, T, H, dtype=torch.float32)


def gradient_shapes(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks, unfilled."""
    dsinks = None if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), given(dsinks, lse)
