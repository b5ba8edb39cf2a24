"""The public ops: arguments checked and brought into one form, a backend chosen, the call made.

A slot that ``key_range.mask`` hides never affects a result or a gradient, whatever lies there, NaN
too. Nor does one beyond the last that any query of its row sees, where there are more slots than
queries, as in a cache that is longer than its tokens; nor one before a row's first.
"""

from typing import Any

from torch import Tensor

from hysparse_kernels.backends import Call, choose
from hysparse_kernels.checks import (
    check_attention,
    check_outputs,
    check_positive,
    checked_gates,
    checked_lists,
    checked_range,
    checked_scale,
    checked_sinks,
)
from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.outputs import Attention, FullAttention


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_range: KeyRange | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    block_size: int | None = None,
    top_k_blocks: int = 0,
    return_block_scores: bool = False,
) -> FullAttention:
    """Causal attention that also selects the key blocks it cares most about (HySparse eq. 1-3).

        p_t = softmax(q_t K^T * scale),  S_t^n = max of p_t over block n and each group's heads
        block_idx_t = the top_k_blocks blocks with the largest S_t; ties go to the earlier block

    Args:
        q: (B, T, H, D). k: (B, S, G, D), H a multiple of G. v: (B, S, G, Dv).
        scale: of the logits; D ** -0.5 by default.
        key_range: which keys each query sees; causal, aligned to the last key, by default. Blocks
            are counted from each query's first key.
        sinks: (H,) logits added to the denominator (gpt-oss), or None.
        softcap: c in c * tanh(logits / c) (Gemma 2), or None.
        block_size: tokens in a key block; needed for scores and selection.
        top_k_blocks: how many blocks to select; 0 selects none.
        return_block_scores: also return S, for all blocks. No gradient flows through it.
    Returns: FullAttention(out, lse, block_idx, block_scores).
    Raises: ValueError on a shape, dtype or option that does not fit.
    """
    check_attention(q, k, v)
    check_positive(block_size=block_size)
    if top_k_blocks < 0:
        raise ValueError(f"top_k_blocks is {top_k_blocks}: it must be at least 0")
    if block_size is None and (top_k_blocks or return_block_scores):
        raise ValueError("top_k_blocks and return_block_scores need block_size")
    result: FullAttention = _run(
        "full_attention",
        q=q,
        k=k,
        v=v,
        key_range=checked_range(key_range, q, k),
        scale=checked_scale(scale, softcap, q),
        sinks=checked_sinks(sinks, q),
        softcap=softcap,
        block_size=block_size,
        top_k_blocks=top_k_blocks,
        return_block_scores=return_block_scores,
    )
    return result


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    key_range: KeyRange | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Attention:
    """Attend each query to its selected key blocks (HySparse eq. 6-7).

        o_t = softmax(q_t K_S^T * scale) V_S,  S = the blocks in block_idx_t, keys after t masked

    Args:
        q: (B, T, H, D). k: (B, S, G, D), H a multiple of G. v: (B, S, G, Dv).
        block_idx: (B, T, G, K) integers, distinct in a list; what is negative or no block pads,
            anywhere.
        block_size: tokens in a key block.
        scale, key_range, sinks, softcap: as in ``full_attention``.
    Returns: Attention(out, lse).
    Raises: ValueError on a shape or dtype that does not fit.
    """
    check_attention(q, k, v)
    check_positive(block_size=block_size)
    result: Attention = _run(
        "block_sparse_attention",
        q=q,
        k=k,
        v=v,
        block_idx=checked_lists(block_idx, q, k),
        key_range=checked_range(key_range, q, k),
        block_size=block_size,
        scale=checked_scale(scale, softcap, q),
        sinks=checked_sinks(sinks, q),
        softcap=softcap,
    )
    return result


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_tokens: int,
    scale: float | None = None,
    key_range: KeyRange | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Attention:
    """Attend each query to itself and the ``window_tokens - 1`` keys before it (HySparse eq. 4-5).

    Args:
        q: (B, T, H, D). k: (B, S, G, D), H a multiple of G. v: (B, S, G, Dv).
        scale, key_range, sinks, softcap: as in ``full_attention``.
    Returns: Attention(out, lse).
    Raises: ValueError on a shape or dtype that does not fit.
    """
    check_attention(q, k, v)
    check_positive(window_tokens=window_tokens)
    result: Attention = _run(
        "sliding_window_attention",
        q=q,
        k=k,
        v=v,
        key_range=checked_range(key_range, q, k),
        window_tokens=window_tokens,
        scale=checked_scale(scale, softcap, q),
        sinks=checked_sinks(sinks, q),
        softcap=softcap,
    )
    return result


def gated_sum(o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor) -> Tensor:
    """The gated sum of both branches (HySparse eq. 8-9).

        o = sigmoid(gate_logits[..., 0]) * o_sparse + sigmoid(gate_logits[..., 1]) * o_window

    Args:
        o_sparse, o_window: (B, T, H, D). gate_logits: (B, T, H, 2).
    Returns: (B, T, H, D) in o_sparse's dtype.
    Raises: ValueError on a shape or dtype that does not fit.
    """
    check_outputs(o_sparse, o_window)
    checked_gates(gate_logits, o_sparse)
    call = Call("gated_sum", o_sparse, o_window, o_window, gate_logits=gate_logits)
    result: Tensor = choose(call).backend.module.gated_sum(
        o_sparse=o_sparse, o_window=o_window, gate_logits=gate_logits
    )
    return result


def sparse_layer_attention(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
    block_idx: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gate_logits: Tensor,
    *,
    block_size: int,
    window_tokens: int,
    sinks: Tensor | None = None,
    scale: float | None = None,
    key_range: KeyRange | None = None,
    window_range: KeyRange | None = None,
    softcap: float | None = None,
) -> Tensor:
    """A sparse attention layer: both branches and their gated sum (HySparse eq. 4-9), fused.

    The same as ``block_sparse_attention`` over the shared keys, ``sliding_window_attention`` over
    the layer's own, and ``gated_sum``, without extra passes over the branches' outputs.

    Args:
        q: (B, T, H, D). shared_k: (B, S, G, D), shared_v: (B, S, G, Dv), of the full layer.
        block_idx: (B, T, G, K), as in ``block_sparse_attention``.
        window_k: (B, S', G, D), window_v: (B, S', G, Dv), the layer's own.
        gate_logits: (B, T, H, 2), block-sparse branch first.
        sinks: (H, 2) logits added to the branches' denominators, or None.
        key_range: over the shared keys. window_range: over the layer's own.
        scale, softcap: as in ``full_attention``.
    Returns: (B, T, H, Dv) in q's dtype.
    Raises: ValueError on a shape or dtype that does not fit.
    """
    check_attention(q, shared_k, shared_v, ("q", "shared_k", "shared_v"))
    check_attention(q, window_k, window_v, ("q", "window_k", "window_v"))
    if shared_v.shape[2:] != window_v.shape[2:]:
        raise ValueError(
            f"shared_v {tuple(shared_v.shape)}, window_v {tuple(window_v.shape)}: "
            "G and Dv must agree"
        )
    check_positive(block_size=block_size, window_tokens=window_tokens)
    result: Tensor = _run(
        "sparse_layer_attention",
        q=q,
        k=shared_k,
        v=shared_v,
        block_idx=checked_lists(block_idx, q, shared_k),
        window_k=window_k,
        window_v=window_v,
        gate_logits=checked_gates(gate_logits, q),
        key_range=checked_range(key_range, q, shared_k),
        window_range=checked_range(window_range, q, window_k, "window_range"),
        block_size=block_size,
        window_tokens=window_tokens,
        scale=checked_scale(scale, softcap, q),
        sinks=checked_sinks(sinks, q, branches=2),
        softcap=softcap,
    )
    return result


def _run(op: str, **arguments: Any) -> Any:
    """The op's result, by the backend that is chosen for these arguments."""
    return getattr(choose(Call(op, **arguments)).backend.module, op)(**arguments)
