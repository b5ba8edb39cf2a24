"""Tensors as kernels take them: descriptors for the copy engine, strides of key ranges."""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
