"""Each branch of a sparse attention layer, and their gated sum, as a torch.library op."""

from typing import Any

from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.outputs import Attention
from hysparse_kernels.triton.arguments import finite, shown
from hysparse_kernels.triton.ops.registration import attention_shapes, register
from hysparse_kernels.triton.sparse.backward import sparse_backward
from hysparse_kernels.triton.sparse.forward import sparse_forward
from hysparse_kernels.triton.window import gates
from hysparse_kernels.triton.window.backward import window_backward
from hysparse_kernels.triton.window.forward import window_forward


def block_sparse_attention(**arguments: Any) -> Attention:
    out, lse = _block_sparse_attention(**arguments)
    return Attention(out, lse.detach())


def sliding_window_attention(**arguments: Any) -> Attention:
    out, lse = _sliding_window_attention(**arguments)
    return Attention(out, lse.detach())


def _shapes(q: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return attention_shapes(q, v)


def _sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    key_range: KeyRange,
    *,
    block_size: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Attention:
    return sparse_forward(
        q,
        *shown(k, v, key_range),
        block_idx,
        key_range,
        block_size=block_size,
        scale=scale,
        sinks=sinks,
        softcap=softcap,
    )


def _sparse_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    out: Tensor,
    lse: Tensor,
    key_range: KeyRange,
    *,
    block_size: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor | None, ...]:
    return sparse_backward(
        d_out,
        finite(q, key_range),
        *shown(k, v, key_range),
        block_idx,
        lse,
        gates.delta(d_out, out),
        key_range,
        block_size=block_size,
        scale=scale,
        sinks=sinks,
        softcap=softcap,
    )


def _window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    *,
    window_tokens: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor | None, ...]:
    out, lse, _ = window_forward(
        q, k, v, key_range, window_tokens=window_tokens, scale=scale, sinks=sinks, softcap=softcap
    )
    return out, lse


def _window_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_range: KeyRange,
    *,
    window_tokens: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor | None, ...]:
    return window_backward(
        d_out,
        finite(q, key_range),
        *shown(k, v, key_range),
        lse,
        gates.delta(d_out, out),
        key_range,
        window_tokens=window_tokens,
        scale=scale,
        sinks=sinks,
        softcap=softcap,
    )


def _shape_of_sum(o_sparse: Tensor, **_: Any) -> Tensor:
    return o_sparse.new_empty(o_sparse.shape)


_block_sparse_attention = register(
    "block_sparse_attention",
    _sparse,
    _sparse_backward,
    shapes=_shapes,
    results=("out", "lse"),
    gradients=("q", "k", "v", "sinks"),
)
_sliding_window_attention = register(
    "sliding_window_attention",
    _window,
    _window_backward,
    shapes=_shapes,
    results=("out", "lse"),
    gradients=("q", "k", "v", "sinks"),
)
gated_sum = register(
    "gated_sum",
    gates.gated_sum,
    gates.gated_sum_backward,
    shapes=_shape_of_sum,
    results=("out",),
    gradients=("o_sparse", "o_window", "gate_logits"),
)
