"""The gated sum of both branches, and what their backward passes need, each in one pass.

A row is one head of one token. All kernels here are bound by memory: a program loads a tile of
rows whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 4096


def gated_sum(o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor) -> Tensor:
    """The gated sum of both branches (HySparse eq. 8-9), in o_sparse's dtype.

        o = sigmoid(gate_logits[..., 0]) * o_sparse + sigmoid(gate_logits[..., 1]) * o_window

    Args:
        o_sparse, o_window: (B, T, H, D). gate_logits: (B, T, H, 2).
    """
    out = torch.empty_like(o_sparse, memory_format=torch.contiguous_format)
    _launch(_gated_sum, _contiguous(o_sparse, o_window, gate_logits), (out,))
    return out


def gated_sum_backward(
    d_out: Tensor, o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``gated_sum``: d_o_sparse, d_o_window, d_gate_logits.

    Args: d_out: (B, T, H, D), the gradient of the sum; the rest as in ``gated_sum``.
    """
    inputs = _contiguous(d_out, o_sparse, o_window, gate_logits)
    d_o_sparse, d_o_window, d_gate_logits = (torch.empty_like(x) for x in inputs[1:])
    _launch(
        _gates_backward, inputs, (d_gate_logits, d_o_sparse, d_o_window, None, None, None, None)
    )
    return d_o_sparse, d_o_window, d_gate_logits


def gates_backward(
    d_out: Tensor, o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """The gates' gradient, and what the backward of each branch needs of the sum.

        delta_i = rowsum(gate_i * d_out * o_i),  gate_i = sigmoid(gate_logits[..., i])

    Args: as in ``gated_sum_backward``.
    Returns: d_gate_logits (B, T, H, 2) in its dtype; (gate_sparse, gate_window), delta_sparse and
        delta_window, all (B, T, H) float32.
    """
    inputs = _contiguous(d_out, o_sparse, o_window, gate_logits)
    d_gate_logits = torch.empty_like(inputs[3])
    gate_sparse, gate_window, delta_sparse, delta_window = (
        d_out.new_empty(d_out.shape[:-1], dtype=torch.float32) for _ in range(4)
    )
    _launch(
        _gates_backward,
        inputs,
        (d_gate_logits, None, None, gate_sparse, gate_window, delta_sparse, delta_window),
    )
    return d_gate_logits, (gate_sparse, gate_window), delta_sparse, delta_window


def delta(d_out: Tensor, out: Tensor) -> Tensor:
    """rowsum(d_out * out) of (B, T, H, D) tensors: (B, T, H) float32."""
    sums = d_out.new_empty(d_out.shape[:-1], dtype=torch.float32)
    _launch(_delta, _contiguous(d_out, out), (sums,))
    return sums


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def _launch(
    kernel: triton.JITFunction, inputs: tuple[Tensor, ...], outputs: tuple[Tensor | None, ...]
) -> None:
    """Run ``kernel`` over tiles of the inputs' rows."""
    D = inputs[0].shape[-1]
    num_rows = inputs[0].shape[:-1].numel()
    padded = triton.next_power_of_2(D)
    rows = max(1, TILE_ELEMENTS // padded)
    if num_rows:
        kernel[(triton.cdiv(num_rows, rows),)](
            *inputs, *outputs, num_rows, D=D, PADDED_D=padded, ROWS=rows, num_warps=4
        )


@triton.jit
def _tile(num_rows, D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows, which of them are real, its elements, and which of those are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED_D)
    real = row < num_rows
    return row, real, row[:, None] * D + d, real[:, None] & (d < D)


@triton.jit
def _gates(gate_logits, row, real):
    sparse = tl.load(gate_logits + 2 * row, mask=real, other=0.0).to(tl.float32)
    window = tl.load(gate_logits + 2 * row + 1, mask=real, other=0.0).to(tl.float32)
    return tl.sigmoid(sparse), tl.sigmoid(window)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_sum(
    o_sparse,
    o_window,
    gate_logits,
    out,
    num_rows,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, real, at, inside = _tile(num_rows, D, PADDED_D, ROWS)
    sparse = tl.load(o_sparse + at, mask=inside, other=0.0).to(tl.float32)
    window = tl.load(o_window + at, mask=inside, other=0.0).to(tl.float32)
    gate_sparse, gate_window = _gates(gate_logits, row, real)
    total = gate_sparse[:, None] * sparse + gate_window[:, None] * window
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _gates_backward(
    d_out,
    o_sparse,
    o_window,
    gate_logits,
    d_gate_logits,
    d_o_sparse,
    d_o_window,
    gate_sparse_out,
    gate_window_out,
    delta_sparse,
    delta_window,
    num_rows,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, real, at, inside = _tile(num_rows, D, PADDED_D, ROWS)
    d_total = tl.load(d_out + at, mask=inside, other=0.0).to(tl.float32)
    sparse = tl.load(o_sparse + at, mask=inside, other=0.0).to(tl.float32)
    window = tl.load(o_window + at, mask=inside, other=0.0).to(tl.float32)
    gate_sparse, gate_window = _gates(gate_logits, row, real)
    sum_sparse = gate_sparse * tl.sum(d_total * sparse, 1)
    sum_window = gate_window * tl.sum(d_total * window, 1)
    dtype = d_gate_logits.dtype.element_ty
    tl.store(d_gate_logits + 2 * row, (sum_sparse * (1 - gate_sparse)).to(dtype), mask=real)
    tl.store(d_gate_logits + 2 * row + 1, (sum_window * (1 - gate_window)).to(dtype), mask=real)
    if d_o_sparse is not None:
        d_sparse, d_window = gate_sparse[:, None] * d_total, gate_window[:, None] * d_total
        tl.store(d_o_sparse + at, d_sparse.to(d_o_sparse.dtype.element_ty), mask=inside)
        tl.store(d_o_window + at, d_window.to(d_o_window.dtype.element_ty), mask=inside)
    if delta_sparse is not None:
        tl.store(gate_sparse_out + row, gate_sparse, mask=real)
        tl.store(gate_window_out + row, gate_window, mask=real)
        tl.store(delta_sparse + row, sum_sparse, mask=real)
        tl.store(delta_window + row, sum_window, mask=real)


@triton.jit(do_not_specialize=["num_rows"])
def _delta(d_out, out, sums, num_rows, D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr):
    row, real, at, inside = _tile(num_rows, D, PADDED_D, ROWS)
    d_total = tl.load(d_out + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + row, tl.sum(d_total * total, 1), mask=real)
