"""A whole sparse attention layer as a torch.library op: both branches, gated and summed.

The window's kernel also gates and sums. The backward makes no gated copies of d_out: the branches'
kernels scale its rows themselves.
"""

from typing import Any

import torch
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import finite, shown
from hysparse_kernels.triton.ops.registration import attention_shapes, register
from hysparse_kernels.triton.sparse.backward import sparse_backward
from hysparse_kernels.triton.sparse.decode import sparse_decode
from hysparse_kernels.triton.sparse.forward import sparse_forward
from hysparse_kernels.triton.tiles import DECODE_ROWS
from hysparse_kernels.triton.window import gates
from hysparse_kernels.triton.window.backward import window_backward
from hysparse_kernels.triton.window.forward import window_forward

DIFFERENTIABLE = ("q", "k", "v", "window_k", "window_v", "gate_logits", "sinks")


def sparse_layer_attention(**arguments: Any) -> Tensor:
    tensors = (arguments[name] for name in DIFFERENTIABLE)
    with_branches = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    )
    out: Tensor = _sparse_layer_attention(with_branches=with_branches, **arguments)[0]
    return out


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gate_logits: Tensor,
    key_range: KeyRange,
    window_range: KeyRange,
    *,
    block_size: int,
    window_tokens: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    with_branches: bool,
) -> tuple[Tensor | None, ...]:
    """out; and where ``with_branches`` each one's out and lse, for the backward."""
    options: dict[str, Any] = {"scale": scale, "softcap": softcap}
    if not with_branches and q.shape[1] * q.shape[2] // k.shape[2] <= DECODE_ROWS:
        decoded = sparse_decode(
            *(q, k, v, block_idx, window_k, window_v, gate_logits, key_range, window_range),
            block_size=block_size,
            window_tokens=window_tokens,
            sinks=sinks,
            **options,
        )
        return decoded, None, None, None, None
    of_sparse, of_window = _by_branch(sinks)
    o_sparse, sparse_lse = sparse_forward(
        q,
        *shown(k, v, key_range),
        block_idx,
        key_range,
        block_size=block_size,
        sinks=of_sparse,
        **options,
    )
    o_window, window_lse, out = window_forward(
        q,
        window_k,
        window_v,
        window_range,
        window_tokens=window_tokens,
        sinks=of_window,
        o_sparse=o_sparse,
        gate_logits=gate_logits,
        keep_out=with_branches,
        **options,
    )
    if not with_branches:
        return out, None, None, None, None
    return out, o_sparse, sparse_lse, o_window, window_lse


def _shapes(q: Tensor, v: Tensor, *, with_branches: bool, **_: Any) -> tuple[Tensor | None, ...]:
    out, lse = attention_shapes(q, v)
    if not with_branches:
        return out, None, None, None, None
    return out, torch.empty_like(out), lse, torch.empty_like(out), torch.empty_like(lse)


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gate_logits: Tensor,
    o_sparse: Tensor,
    sparse_lse: Tensor,
    o_window: Tensor,
    window_lse: Tensor,
    key_range: KeyRange,
    window_range: KeyRange,
    *,
    block_size: int,
    window_tokens: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor | None, ...]:
    d_gate_logits, (sparse_gate, window_gate), sparse_delta, window_delta = gates.gates_backward(
        d_out, o_sparse, o_window, gate_logits
    )
    of_sparse, of_window = _by_branch(sinks)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap}
    hides = key_range.first is not None or key_range.mask is not None
    q = finite(q, key_range if hides else window_range)
    dq, dk, dv, d_of_sparse = sparse_backward(
        d_out,
        q,
        *shown(k, v, key_range),
        block_idx,
        sparse_lse,
        sparse_delta,
        key_range,
        block_size=block_size,
        sinks=of_sparse,
        gate=sparse_gate,
        **options,
    )
    dq, d_window_k, d_window_v, d_of_window = window_backward(
        d_out,
        q,
        *shown(window_k, window_v, window_range),
        window_lse,
        window_delta,
        window_range,
        window_tokens=window_tokens,
        sinks=of_window,
        gate=window_gate,
        dq_add=dq,
        **options,
    )
    d_sinks = None
    if d_of_sparse is not None and d_of_window is not None:
        d_sinks = torch.stack([d_of_sparse, d_of_window], dim=1)
    return dq, dk, dv, d_window_k, d_window_v, d_gate_logits, d_sinks


def _by_branch(sinks: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Sinks (H, 2) as (H,) of each branch, contiguous."""
    if sinks is None:
        return None, None
    of_sparse, of_window = sinks.t().contiguous().unbind(0)
    return of_sparse, of_window


_sparse_layer_attention = register(
    "sparse_layer_attention",
    _forward,
    _backward,
    shapes=_shapes,
    results=("out", "o_sparse", "sparse_lse", "o_window", "window_lse"),
    gradients=DIFFERENTIABLE,
)
