"""A whole sparse attention layer as a torch.library op: both branches, gated and summed.

The window's kernel also gates and sums. The backward makes no gated copies of d_out: the branches'
kernels scale its rows themselves.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import finite, shown
from hysparse_kernels.triton.ops.results import attention_shapes, given, present
from hysparse_kernels.triton.sparse.backward import sparse_backward
from hysparse_kernels.triton.sparse.decode import sparse_decode
from hysparse_kernels.triton.sparse.forward import sparse_forward
from hysparse_kernels.triton.tiles import DECODE_ROWS
from hysparse_kernels.triton.window import gates
from hysparse_kernels.triton.window.backward import window_backward
from hysparse_kernels.triton.window.forward import window_forward


@custom_op("hysparse::sparse_layer_attention", mutates_args=())
def sparse_layer_attention(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    block_idx: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gate_logits: Tensor,
    sinks: Tensor | None,
    first: Tensor | None,
    last: Tensor,
    mask: Tensor | None,
    diagonal: int | None,
    window_first: Tensor | None,
    window_last: Tensor,
    window_mask: Tensor | None,
    window_diagonal: int | None,
    block_size: int,
    window_tokens: int,
    scale: float,
    softcap: float | None,
    with_branches: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out; and where ``with_branches`` each one's out and lse, for the backward."""
    seen = KeyRange(first, last, mask, diagonal)
    window_seen = KeyRange(window_first, window_last, window_mask, window_diagonal)
    if not with_branches and q.shape[1] * q.shape[2] // shared_k.shape[2] <= DECODE_ROWS:
        out = sparse_decode(
            q,
            shared_k,
            shared_v,
            block_idx,
            window_k,
            window_v,
            gate_logits,
            seen,
            window_seen,
            block_size=block_size,
            window_tokens=window_tokens,
            scale=scale,
            sinks=sinks,
            softcap=softcap,
        )
        return out, *(q.new_empty(0) for _ in range(4))  # type: ignore[return-value]
    of_sparse, of_window = (None, None) if sinks is None else sinks.t().contiguous().unbind(0)
    sparse = sparse_forward(
        q,
        *shown(shared_k, shared_v, seen),
        block_idx,
        seen,
        block_size=block_size,
        scale=scale,
        sinks=of_sparse,
        softcap=softcap,
    )
    o_window, window_lse, gated = window_forward(
        q,
        window_k,
        window_v,
        window_seen,
        window_tokens=window_tokens,
        scale=scale,
        sinks=of_window,
        softcap=softcap,
        o_sparse=sparse.out,
        gate_logits=gate_logits,
        keep_out=with_branches,
    )
    assert gated is not None
    if not with_branches:
        return gated, *(q.new_empty(0) for _ in range(4))  # type: ignore[return-value]
    return gated, sparse.out, sparse.lse, given(o_window, q), window_lse


@sparse_layer_attention.register_fake
def _(q: Tensor, shared_k: Tensor, shared_v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    out, lse = attention_shapes(q, shared_v)
    if not options[-1]:
        return out, *(q.new_empty(0) for _ in range(4))
    return out, torch.empty_like(out), lse, torch.empty_like(out), torch.empty_like(lse)


@custom_op("hysparse::sparse_layer_attention_backward", mutates_args=())
def sparse_layer_attention_backward(
    d_out: Tensor,
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    block_idx: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gate_logits: Tensor,
    o_sparse: Tensor,
    sparse_lse: Tensor,
    o_window: Tensor,
    window_lse: Tensor,
    sinks: Tensor | None,
    first: Tensor | None,
    last: Tensor,
    mask: Tensor | None,
    diagonal: int | None,
    window_first: Tensor | None,
    window_last: Tensor,
    window_mask: Tensor | None,
    window_diagonal: int | None,
    block_size: int,
    window_tokens: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, shared_k, shared_v, window_k, window_v, gate_logits and sinks."""
    d_gate_logits, (sparse_gate, window_gate), sparse_delta, window_delta = gates.gates_backward(
        d_out, o_sparse, o_window, gate_logits
    )
    of_sparse, of_window = (None, None) if sinks is None else sinks.t().contiguous().unbind(0)
    seen = KeyRange(first, last, mask, diagonal)
    window_seen = KeyRange(window_first, window_last, window_mask, window_diagonal)
    q = finite(q, window_seen if first is None and mask is None else seen)
    dq, d_shared_k, d_shared_v, d_of_sparse = sparse_backward(
        d_out,
        q,
        *shown(shared_k, shared_v, seen),
        block_idx,
        sparse_lse,
        sparse_delta,
        seen,
        block_size=block_size,
        scale=scale,
        sinks=of_sparse,
        softcap=softcap,
        gate=sparse_gate,
    )
    dq, d_window_k, d_window_v, d_of_window = window_backward(
        d_out,
        q,
        *shown(window_k, window_v, window_seen),
        window_lse,
        window_delta,
        window_seen,
        window_tokens=window_tokens,
        scale=scale,
        sinks=of_window,
        softcap=softcap,
        gate=window_gate,
        dq_add=dq,
    )
    dsinks = q.new_empty(0)
    if d_of_sparse is not None and d_of_window is not None:
        dsinks = torch.stack([d_of_sparse, d_of_window], dim=1)
    return dq, d_shared_k, d_shared_v, d_window_k, d_window_v, d_gate_logits, dsinks


@sparse_layer_attention_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    block_idx: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gate_logits: Tensor,
    o_sparse: Tensor,
    sparse_lse: Tensor,
    o_window: Tensor,
    window_lse: Tensor,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    like = (q, shared_k, shared_v, window_k, window_v, gate_logits)
    dsinks = None if sinks is None else torch.empty_like(sinks)
    return *(x.new_empty(x.shape) for x in like), given(dsinks, q)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, sinks, seen, window_seen = inputs[:7], inputs[7], inputs[8:12], inputs[12:16]
    *ctx.options, _ = inputs[16:]
    ctx.diagonals = seen[3], window_seen[3]
    ctx.save_for_backward(*tensors, *output[1:], sinks, *seen[:3], *window_seen[:3])


def _gradients(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    tensors, sinks, seen, window_seen = saved[:11], saved[11], saved[12:15], saved[15:18]
    ranges = *seen, ctx.diagonals[0], *window_seen, ctx.diagonals[1]
    dq, d_shared_k, d_shared_v, d_window_k, d_window_v, d_gate_logits, dsinks = (
        sparse_layer_attention_backward(d_out, *tensors, sinks, *ranges, *ctx.options)
    )
    by_tensor = dq, d_shared_k, d_shared_v, None, d_window_k, d_window_v, d_gate_logits
    return *by_tensor, present(dsinks, sinks), *(None,) * 13


sparse_layer_attention.register_autograd(_gradients, setup_context=_keep)
