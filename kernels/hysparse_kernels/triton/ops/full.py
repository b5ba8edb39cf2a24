"""Full attention as a torch.library op."""

from typing import Any

import torch
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.outputs import FullAttention
from hysparse_kernels.triton.arguments import finite, shown
from hysparse_kernels.triton.full.attention import attend_and_select
from hysparse_kernels.triton.full.backward import full_backward
from hysparse_kernels.triton.ops.registration import attention_shapes, register


def full_attention(
    *, top_k_blocks: int, return_block_scores: bool, **arguments: Any
) -> FullAttention:
    out, lse, block_idx, block_scores = _full_attention(
        top_k_blocks=top_k_blocks, return_block_scores=return_block_scores, **arguments
    )
    return FullAttention(
        out,
        lse.detach(),
        block_idx if top_k_blocks else None,
        block_scores.detach() if return_block_scores else None,
    )


def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | None,
    top_k_blocks: int,
    return_block_scores: bool,
    **_: Any,
) -> tuple[Tensor | None, ...]:
    B, T, G = *q.shape[:2], k.shape[2]
    block_idx = scores = None
    if block_size and top_k_blocks:
        block_idx = q.new_empty(B, T, G, top_k_blocks, dtype=torch.int32)
    if block_size and return_block_scores:
        scores = q.new_empty(B, T, G, -(-k.shape[1] // block_size), dtype=torch.float32)
    return *attention_shapes(q, v), block_idx, scores


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor | None, ...]:
    return full_backward(
        d_out,
        finite(q, key_range),
        *shown(k, v, key_range),
        out,
        lse,
        key_range,
        plain_causal=key_range.diagonal == 0 and q.shape[1] == k.shape[1],
        scale=scale,
        sinks=sinks,
        softcap=softcap,
    )


_full_attention = register(
    "full_attention",
    attend_and_select,
    _backward,
    shapes=_shapes,
    results=("out", "lse", "block_idx", "block_scores"),
    gradients=("q", "k", "v", "sinks"),
)
