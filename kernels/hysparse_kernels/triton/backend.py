"""The Triton backend: the reference's functions, run by kernels."""

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton import knobs

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.outputs import Attention, FullAttention
from hysparse_kernels.triton.arguments import COPIED_BYTES
from hysparse_kernels.triton.ops import branches, full, layer

if TYPE_CHECKING:
    from hysparse_kernels.backends import Call

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_SIZES = (16, 32, 64, 128)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
CAPABILITY = (9, 0)  # less has too little shared memory for the tiles


def refuses(call: "Call") -> str | None:
    """The reason why no kernel runs the call, or None.

    On a CPU kernels run in Triton's interpreter, which is for tests: only where
    ``HYSPARSE_BACKEND=triton`` asks for it.
    """
    reason: str | None = _refuses_device(call.q.device)
    dims = call.q.shape[3], call.v.shape[3]
    if reason is not None:
        return reason
    if call.q.dtype not in DTYPES:
        return f"q is {call.q.dtype}: the kernels know bfloat16, float16 and float32"
    if call.block_size is not None and call.block_size not in BLOCK_SIZES:
        return f"block_size is {call.block_size}: the kernels know 16, 32, 64 and 128"
    if min(dims) < MIN_HEAD_DIM or max(dims) > MAX_HEAD_DIM:
        return f"the head dims are {dims[0]} and {dims[1]}: the kernels know 16 to 256"
    if any(dim * call.q.element_size() % COPIED_BYTES for dim in dims):
        return f"the head dims are {dims[0]} and {dims[1]}: rows must be multiples of 16 bytes"
    return None


@torch.compiler.assume_constant_result
def _refuses_device(device: torch.device) -> str | None:
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < CAPABILITY:
            return f"{torch.cuda.get_device_name(device)} has compute capability below 9.0"
    elif device.type != "cpu" or not knobs.runtime.interpret:
        return f"q is on {device}: the kernels need a CUDA device"
    elif os.environ.get("HYSPARSE_BACKEND") != "triton":
        return "Triton's interpreter is for tests: HYSPARSE_BACKEND=triton asks for it"
    return None


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    block_size: int | None,
    top_k_blocks: int,
    return_block_scores: bool,
) -> FullAttention:
    out, lse, block_idx, block_scores = full.full_attention(
        q,
        k,
        v,
        *key_range,
        sinks,
        scale,
        softcap,
        block_size,
        top_k_blocks,
        return_block_scores,
    )
    return FullAttention(
        out,
        lse.detach(),
        block_idx if top_k_blocks else None,
        block_scores.detach() if return_block_scores else None,
    )


def block_sparse_attention(
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
    out, lse = branches.block_sparse_attention(
        q, k, v, block_idx, *key_range, sinks, block_size, scale, softcap
    )
    return Attention(out, lse.detach())


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    *,
    window_tokens: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Attention:
    out, lse = branches.sliding_window_attention(
        q, k, v, *key_range, sinks, window_tokens, scale, softcap
    )
    return Attention(out, lse.detach())


def gated_sum(o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor) -> Tensor:
    total: Tensor = branches.gated_sum(o_sparse, o_window, gate_logits)
    return total


def sparse_layer_attention(
    q: Tensor,
    shared_k: Tensor,
    shared_v: Tensor,
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
) -> Tensor:
    tensors = q, shared_k, shared_v, window_k, window_v, gate_logits, sinks
    with_branches = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    )
    out, *_ = layer.sparse_layer_attention(
        q,
        shared_k,
        shared_v,
        block_idx,
        window_k,
        window_v,
        gate_logits,
        sinks,
        *key_range,
        *window_range,
        block_size,
        window_tokens,
        scale,
        softcap,
        with_branches,
    )
    result: Tensor = out
    return result
