"""Full attention as a torch.library op, for autograd, torch.compile and export.

A key range travels as its fields: first, last, mask, diagonal.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import finite, shown
from hysparse_kernels.triton.full.attention import attend_and_select
from hysparse_kernels.triton.full.backward import full_backward
from hysparse_kernels.triton.ops.results import attention_shapes, given, gradient_shapes, present


@custom_op("hysparse::full_attention", mutates_args=())
def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    last: Tensor,
    mask: Tensor | None,
    diagonal: int | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    block_size: int | None,
    top_k_blocks: int,
    return_block_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, block_idx and block_scores; the last two of size 0 where not asked for."""
    out, lse, block_idx, block_scores = attend_and_select(
        q,
        k,
        v,
        KeyRange(first, last, mask, diagonal),
        scale=scale,
        sinks=sinks,
        softcap=softcap,
        block_size=block_size,
        top_k_blocks=top_k_blocks,
        return_block_scores=return_block_scores,
    )
    B, T, G = *q.shape[:2], k.shape[2]
    if block_idx is None:
        block_idx = q.new_empty(B, T, G, 0, dtype=torch.int32)
    if block_scores is None:
        block_scores = q.new_empty(B, T, G, 0, dtype=torch.float32)
    return out, lse, block_idx, block_scores


@full_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, block_size, top_k_blocks, return_block_scores = options
    B, T, G = *q.shape[:2], k.shape[2]
    num_blocks = -(-k.shape[1] // block_size) if block_size and return_block_scores else 0
    block_idx = q.new_empty(B, T, G, top_k_blocks, dtype=torch.int32)
    scores = q.new_empty(B, T, G, num_blocks, dtype=torch.float32)
    return *attention_shapes(q, v), block_idx, scores


@custom_op("hysparse::full_attention_backward", mutates_args=())
def full_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor | None,
    last: Tensor,
    mask: Tensor | None,
    diagonal: int | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks."""
    seen = KeyRange(first, last, mask, diagonal)
    dq, dk, dv, dsinks = full_backward(
        d_out,
        finite(q, seen),
        *shown(k, v, seen),
        out,
        lse,
        seen,
        plain_causal=diagonal == 0 and q.shape[1] == k.shape[1],
        scale=scale,
        sinks=sinks,
        softcap=softcap,
    )
    return dq, dk, dv, given(dsinks, lse)


@full_attention_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    lse, _first, _last, _mask, _diagonal, sinks, *_ = rest
    return gradient_shapes(q, k, v, lse, sinks)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, first, last, mask, diagonal, sinks, scale, softcap, *_ = inputs
    ctx.save_for_backward(q, k, v, *output[:2], first, last, mask, sinks)
    ctx.options = diagonal, scale, softcap


def _gradients(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, first, last, mask, sinks = ctx.saved_tensors
    diagonal, scale, softcap = ctx.options
    dq, dk, dv, dsinks = full_attention_backward(
        d_out, q, k, v, out, lse, first, last, mask, diagonal, sinks, scale, softcap
    )
    return dq, dk, dv, *(None,) * 4, present(dsinks, sinks), *(None,) * 5


full_attention.register_autograd(_gradients, setup_context=_keep)
