"""The Triton backend: the reference's functions, run by kernels, and what they refuse."""

import os
from typing import TYPE_CHECKING

import torch
from triton import knobs

from hysparse_kernels.triton.arguments import COPIED_BYTES
from hysparse_kernels.triton.ops.branches import (
    block_sparse_attention,
    gated_sum,
    sliding_window_attention,
)
from hysparse_kernels.triton.ops.full import full_attention
from hysparse_kernels.triton.ops.layer import sparse_layer_attention

if TYPE_CHECKING:
    from hysparse_kernels.backends import Call

__all__ = [
    "block_sparse_attention",
    "full_attention",
    "gated_sum",
    "refuses",
    "sliding_window_attention",
    "sparse_layer_attention",
]

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
