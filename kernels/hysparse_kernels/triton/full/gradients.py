"""Full attention's gradients, for every key range and soft capping.

    dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale * dS K,  dK = scale * dS^T Q

with delta = rowsum(dO * O), which a sink in the denominator leaves as it is. One kernel sums dK and
dV over the queries and heads that see a key tile, another dQ over the keys, both without atomics.
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import describe, strides_of
from hysparse_kernels.triton.full.key_gradients import find_queries, sum_over_queries
from hysparse_kernels.triton.full.query_gradients import sum_over_keys


def gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse2: Tensor,
    key_range: KeyRange,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous; delta and lse2 as ``full_backward.statistics`` gives them."""
    B, T, H, D = q.shape
    S, G, Dv = v.shape[1:]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    first, last, mask = key_range.first, key_range.last, key_range.mask
    padded_d, padded_dv = (max(16, triton.next_power_of_2(x)) for x in (D, Dv))
    sizes = {
        "H": H,
        "GROUP": H // G,
        "D": D,
        "PADDED_D": padded_d,
        "DV": Dv,
        "PADDED_DV": padded_dv,
    }
    ranges = (
        first,
        *strides_of(first),
        last,
        *strides_of(last),
        None if mask is None else mask.view(torch.uint8),
        *strides_of(mask),
    )
    rest = (B, T, S, scale, softcap)

    rows, keys, num_warps, num_stages = _tiles_of_keys(q.dtype, padded_d + padded_dv)
    tiles = triton.cdiv(S, keys)
    bounds = torch.empty(B, tiles, 4, dtype=torch.int32, device=q.device)
    find_queries[(tiles * B,)](*ranges[:6], bounds, None, B, T, S, KEYS=keys, ROWS=rows, CHUNK=1024)
    sum_over_queries[(tiles * G * B,)](
        describe(q, rows, padded_d),
        describe(d_out, rows, padded_dv),
        describe(k, keys, padded_d),
        describe(v, keys, padded_dv),
        dk,
        dv,
        bounds,
        *ranges,
        *(_describe_rows(x, rows) for x in (delta, lse2)),
        *rest,
        **sizes,
        ROWS=rows,
        KEYS=keys,
        num_warps=num_warps,
        num_stages=num_stages,
    )

    rows, keys, num_warps, num_stages = _tiles_of_queries(q.dtype, padded_d + padded_dv)
    sum_over_keys[(triton.cdiv(T, rows) * H * B,)](
        describe(q, rows, padded_d),
        describe(d_out, rows, padded_dv),
        describe(k, keys, padded_d),
        describe(v, keys, padded_dv),
        dq,
        *ranges,
        delta,
        lse2,
        *rest,
        **sizes,
        ROWS=rows,
        KEYS=keys,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return dq, dk, dv


def _tiles_of_keys(dtype: torch.dtype, dims: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps and stages of the sums over queries: dK and dV."""
    if dtype == torch.float32:
        return 16, 16, 8, 1
    return 64, 64, 4 if dims <= 256 else 8, 2


def _tiles_of_queries(dtype: torch.dtype, dims: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps and stages of the sum over keys: dQ."""
    if dtype == torch.float32:
        return 16, 16, 8, 1
    if dims <= 256:
        return 64, 64, 4, 2
    return (128, 64, 8, 2) if dims <= 384 else (128, 32, 8, 2)


def _describe_rows(x: Tensor, rows: int) -> TensorDescriptor:
    """``x`` (B, H, padded T) for loads of (1, rows) at (b * H + h, t)."""
    return TensorDescriptor(x, [x.shape[0] * x.shape[1], x.shape[2]], [x.stride(1), 1], [1, rows])
