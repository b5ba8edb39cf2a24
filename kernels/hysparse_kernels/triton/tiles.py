"""Holds what the kernels share: base-2 logits, soft capping, products in full precision."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Queries times query heads a KV head, up to which the decode kernels serve.
DECODE_ROWS = 64


@triton.jit
def tanh(x):
    """tanh of a float32 tile, from exp2, which the interpreter knows, too."""
    decay = tl.exp2(-2 * LOG2_E * tl.abs(x))
    size = (1 - decay) / (1 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def dot(a, b):
    """a @ b in float32; float32 operands are not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")
