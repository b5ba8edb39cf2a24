"""Holds what the warp-specialised kernels for Hopper share: tile sizes, and what they take."""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from hysparse_kernels.triton.arguments import copyable

GROUP_ROWS = 64  # of a warpgroup
TILE_ROWS = 2 * GROUP_ROWS
TILE_KEYS = 128
STAGES = 2
HEAD_DIMS = (64, 128)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


def suits(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None) -> bool:
    """Whether the GPU, the dtype and the head dims are what these kernels are made for."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in DTYPES
        and q.shape[3] == v.shape[3]
        and q.shape[3] in HEAD_DIMS
        and softcap is None
        and scale > 0
        and all(copyable(x) for x in (q, k, v))
    )
