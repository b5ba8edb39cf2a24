"""The public ops: shapes checked, a backend chosen, the call handed on."""

from torch import Tensor

from hysparse_kernels.backends import Call, choose
from hysparse_kernels.key_range import KeyRange, causal
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
    _check(q, k, v, sinks)
    if block_size is None and (top_k_blocks or return_block_scores):
        raise ValueError("top_k_blocks and return_block_scores need block_size")
    _check_positive(block_size=block_size)
    backend = choose(Call("full_attention", q, k, v, block_size)).backend.module
    result: FullAttention = backend.full_attention(
        q,
        k,
        v,
        key_range or causal(q.shape[1], k.shape[1], q.device),
        scale=_scale(scale, q),
        sinks=sinks,
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
        block_idx: (B, T, G, K) integers, distinct in a list, -1 pads anywhere.
        block_size: tokens in a key block.
        scale, key_range, sinks, softcap: as in ``full_attention``.
    Returns: Attention(out, lse).
    Raises: ValueError on a shape or dtype that does not fit.
    """
    _check(q, k, v, sinks)
    _check_positive(block_size=block_size)
    _check_lists(q, k, block_idx)
    backend = choose(Call("block_sparse_attention", q, k, v, block_size)).backend.module
    result: Attention = backend.block_sparse_attention(
        q,
        k,
        v,
        block_idx,
        key_range or causal(q.shape[1], k.shape[1], q.device),
        block_size=block_size,
        scale=_scale(scale, q),
        sinks=sinks,
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
    _check(q, k, v, sinks)
    _check_positive(window_tokens=window_tokens)
    backend = choose(Call("sliding_window_attention", q, k, v)).backend.module
    result: Attention = backend.sliding_window_attention(
        q,
        k,
        v,
        key_range or causal(q.shape[1], k.shape[1], q.device),
        window_tokens=window_tokens,
        scale=_scale(scale, q),
        sinks=sinks,
        softcap=softcap,
    )
    return result


def gated_sum(o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor) -> Tensor:
    """The gated sum of both branches (HySparse eq. 8-9).

        o = sigmoid(gate_logits[..., 0]) * o_sparse + sigmoid(gate_logits[..., 1]) * o_window

    Args:
        o_sparse, o_window: (B, T, H, D). gate_logits: (B, T, H, 2).
    Returns: (B, T, H, D) in o_sparse's dtype.
    Raises: ValueError on a shape that does not fit.
    """
    if o_sparse.shape != o_window.shape or gate_logits.shape != (*o_sparse.shape[:-1], 2):
        raise ValueError(
            f"o_sparse {tuple(o_sparse.shape)}, o_window {tuple(o_window.shape)} and gate_logits "
            f"{tuple(gate_logits.shape)} do not fit (B, T, H, D), (B, T, H, D), (B, T, H, 2)"
        )
    backend = choose(Call("gated_sum", o_sparse, o_window, o_window)).backend.module
    result: Tensor = backend.gated_sum(o_sparse, o_window, gate_logits)
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
    by_branch = (None, None) if sinks is None else sinks.unbind(-1)
    for keys, values, sink in (
        (shared_k, shared_v, by_branch[0]),
        (window_k, window_v, by_branch[1]),
    ):
        _check(q, keys, values, sink)
    _check_lists(q, shared_k, block_idx)
    _check_positive(block_size=block_size, window_tokens=window_tokens)
    if gate_logits.shape != (*q.shape[:3], 2):
        raise ValueError(
            f"gate_logits has shape {tuple(gate_logits.shape)}, expected "
            f"(B, T, H, 2) = {(*q.shape[:3], 2)}"
        )
    call = Call("sparse_layer_attention", q, shared_k, shared_v, block_size)
    result: Tensor = choose(call).backend.module.sparse_layer_attention(
        q,
        shared_k,
        shared_v,
        block_idx,
        window_k,
        window_v,
        gate_logits,
        key_range or causal(q.shape[1], shared_k.shape[1], q.device),
        window_range or causal(q.shape[1], window_k.shape[1], q.device),
        block_size=block_size,
        window_tokens=window_tokens,
        scale=_scale(scale, q),
        sinks=sinks,
        softcap=softcap,
    )
    return result


def _check_lists(q: Tensor, k: Tensor, block_idx: Tensor) -> None:
    if block_idx.shape[:-1] != (q.shape[0], q.shape[1], k.shape[2]):
        raise ValueError(
            f"block_idx has shape {tuple(block_idx.shape)}, expected "
            f"(B, T, G, K) = ({q.shape[0]}, {q.shape[1]}, {k.shape[2]}, K)"
        )


def _check(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{shapes}: expected (B, T, H, D), (B, S, G, D), (B, S, G, Dv)")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: B and D must agree, and H be a multiple of G")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one floating dtype")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}, expected (H,) = ({q.shape[2]},)")


def _check_positive(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale
