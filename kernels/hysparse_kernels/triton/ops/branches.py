"""Each branch of a sparse attention layer, and their gated sum, as a torch.library op."""

from typing import Any

from torch import Tensor
from torch.library import custom_op

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import finite, shown
from hysparse_kernels.triton.ops.results import attention_shapes, given, gradient_shapes, present
from hysparse_kernels.triton.sparse.backward import sparse_backward
from hysparse_kernels.triton.sparse.forward import sparse_forward
from hysparse_kernels.triton.window import gates
from hysparse_kernels.triton.window.backward import window_backward
from hysparse_kernels.triton.window.forward import window_forward


@custom_op("hysparse::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    first: Tensor | None,
    last: Tensor,
    mask: Tensor | None,
    diagonal: int | None,
    sinks: Tensor | None,
    block_size: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    seen = KeyRange(first, last, mask, diagonal)
    out, lse = sparse_forward(
        q,
        *shown(k, v, seen),
        block_idx,
        seen,
        block_size=block_size,
        scale=scale,
        sinks=sinks,
        softcap=softcap,
    )
    return out, lse


@block_sparse_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return attention_shapes(q, v)


@custom_op("hysparse::block_sparse_attention_backward", mutates_args=())
def block_sparse_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    out: Tensor,
    lse: Tensor,
    first: Tensor | None,
    last: Tensor,
    mask: Tensor | None,
    diagonal: int | None,
    sinks: Tensor | None,
    block_size: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks."""
    seen = KeyRange(first, last, mask, diagonal)
    dq, dk, dv, dsinks = sparse_backward(
        d_out,
        finite(q, seen),
        *shown(k, v, seen),
        block_idx,
        lse,
        gates.delta(d_out, out),
        seen,
        block_size=block_size,
        scale=scale,
        sinks=sinks,
        softcap=softcap,
    )
    return dq, dk, dv, given(dsinks, lse)


@block_sparse_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _block_idx, _out, lse, _first, _last, _mask, _diagonal, sinks, *_ = rest
    return gradient_shapes(q, k, v, lse, sinks)


def _keep_sparse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, block_idx, first, last, mask, diagonal, sinks, *ctx.options = inputs
    ctx.diagonal = diagonal
    ctx.save_for_backward(q, k, v, block_idx, *output, first, last, mask, sinks)


def _sparse_gradients(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = block_sparse_attention_backward(
        d_out, *tensors, ctx.diagonal, sinks, *ctx.options
    )
    return dq, dk, dv, *(None,) * 5, present(dsinks, sinks), *(None,) * 3


block_sparse_attention.register_autograd(_sparse_gradients, setup_context=_keep_sparse)


@custom_op("hysparse::sliding_window_attention", mutates_args=())
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    last: Tensor,
    mask: Tensor | None,
    diagonal: int | None,
    sinks: Tensor | None,
    window_tokens: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    out, lse, _ = window_forward(
        q,
        k,
        v,
        KeyRange(first, last, mask, diagonal),
        window_tokens=window_tokens,
        scale=scale,
        sinks=sinks,
        softcap=softcap,
    )
    assert out is not None
    return out, lse


@sliding_window_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return attention_shapes(q, v)


@custom_op("hysparse::sliding_window_attention_backward", mutates_args=())
def sliding_window_attention_backward(
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
    window_tokens: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks."""
    seen = KeyRange(first, last, mask, diagonal)
    dq, dk, dv, dsinks = window_backward(
        d_out,
        finite(q, seen),
        *shown(k, v, seen),
        lse,
        gates.delta(d_out, out),
        seen,
        window_tokens=window_tokens,
        scale=scale,
        sinks=sinks,
        softcap=softcap,
    )
    return dq, dk, dv, given(dsinks, lse)


@sliding_window_attention_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _out, lse, _first, _last, _mask, _diagonal, sinks, *_ = rest
    return gradient_shapes(q, k, v, lse, sinks)


def _keep_window(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, first, last, mask, diagonal, sinks, *ctx.options = inputs
    ctx.diagonal = diagonal
    ctx.save_for_backward(q, k, v, *output, first, last, mask, sinks)


def _window_gradients(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = sliding_window_attention_backward(
        d_out, *tensors, ctx.diagonal, sinks, *ctx.options
    )
    return dq, dk, dv, *(None,) * 4, present(dsinks, sinks), *(None,) * 3


sliding_window_attention.register_autograd(_window_gradients, setup_context=_keep_window)


@custom_op("hysparse::gated_sum", mutates_args=())
def gated_sum(o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor) -> Tensor:
    """sigmoid(gate_logits[..., 0]) * o_sparse + sigmoid(gate_logits[..., 1]) * o_window."""
    return gates.gated_sum(o_sparse, o_window, gate_logits)


@gated_sum.register_fake
def _(o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor) -> Tensor:
    return o_sparse.new_empty(o_sparse.shape)


@custom_op("hysparse::gated_sum_backward", mutates_args=())
def gated_sum_backward(
    d_out: Tensor, o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d_o_sparse, d_o_window and d_gate_logits."""
    return gates.gated_sum_backward(d_out, o_sparse, o_window, gate_logits)


@gated_sum_backward.register_fake
def _(
    d_out: Tensor, o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    like = (o_sparse, o_window, gate_logits)
    d_o_sparse, d_o_window, d_gate_logits = (x.new_empty(x.shape) for x in like)
    return d_o_sparse, d_o_window, d_gate_logits


def _keep_gates(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = gated_sum_backward(d_out, *ctx.saved_tensors)
    return gradients


gated_sum.register_autograd(_gate_gradients, setup_context=_keep_gates)
