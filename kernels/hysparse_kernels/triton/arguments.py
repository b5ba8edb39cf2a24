"""Tensors as kernels take them: descriptors, strides of key ranges, nothing that may hold NaN."""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hysparse_kernels.key_range import KeyRange

COPIED_BYTES = 16  # by the copy engine at a time: bases and strides are multiples of it


def copyable(x: Tensor) -> bool:
    """Whether the copy engine reads ``x`` where it lies."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % COPIED_BYTES == 0
    return aligned and x.stride(-1) == 1 and all(n > 0 and n % COPIED_BYTES == 0 for n in steps)


def describe_tiles(x: Tensor, tile: list[int]) -> TensorDescriptor:
    """``x``, or a copy, to load or store by ``tile``: zero outside, where stores write nothing."""
    if not copyable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile)


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """``x`` (B, S, G, D) for tiles (1, 1, rows, columns) at (b, g, slot, 0)."""
    return describe_tiles(x.transpose(1, 2), [1, 1, rows, columns])


def last_contiguous(x: Tensor) -> Tensor:
    """``x``, copied where its last dim is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_of(x: Tensor | None) -> tuple[int, int]:
    """Strides of (B or 1, T) or (B, S), 0 where one row serves the batch or there is none."""
    return (0, 0) if x is None else (0 if x.shape[0] == 1 else x.stride(0), x.stride(1))


def leaves_out(key_range: KeyRange, num_queries: int, num_keys: int) -> bool:
    """Whether there may be slots that no query sees: masked, or more than there are queries."""
    return key_range.mask is not None or num_keys > num_queries + (key_range.diagonal or 0)


def shown(k: Tensor, v: Tensor, key_range: KeyRange) -> tuple[Tensor, Tensor]:
    """``k`` and ``v`` (B, S, G, D), copied with 0 where ``leaves_out`` finds slots no query sees.

    What lies there may be NaN, and 0 * NaN is NaN.
    """
    num_queries, num_keys = key_range.last.shape[1], k.shape[1]
    if not num_queries or not leaves_out(key_range, num_queries, num_keys):
        return k, v
    seen = key_range.shown(num_keys)[:, :, None, None]
    return torch.where(seen, k, 0), torch.where(seen, v, 0)


def finite(q: Tensor, key_range: KeyRange) -> Tensor:
    """``q`` as a backward reads it: copied, 0 for NaN and infinities, where rows may see nothing.

    A row that sees a key and has NaN has it in its lse, too.
    """
    if key_range.first is None and key_range.mask is None:
        return q
    return q.nan_to_num(0.0, 0.0, 0.0)
