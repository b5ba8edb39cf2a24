"""Full attention, backward: cuDNN's where it takes the case, else our own kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import last_contiguous
from hysparse_kernels.triton.full.gradients import gradients
from hysparse_kernels.triton.full.query_gradients import STATISTICS
from hysparse_kernels.triton.tiles import LOG2_E

UNSEEING: tl.constexpr = tl.constexpr(1e38)  # the log of the total of a row that weighs no key


def full_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_range: KeyRange,
    *,
    plain_causal: bool,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of full attention; the selection has none.

    Args:
        d_out, out: (B, T, H, Dv). q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv).
        lse: (B, T, H) float32, natural, sink included.
        key_range: any.
        plain_causal: whether T == S and each query sees all keys up to its own.
        sinks: (H,) logits added to the denominator, or None.
        softcap: c in c * tanh(logits / c), or None.
    Returns: dq, dk, dv, contiguous, and dsinks, None without sinks; each of its input's dtype.
    """
    if not (q.numel() and k.numel()):
        no_sinks = None if sinks is None else torch.zeros_like(sinks)
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), no_sinks
    d_out = d_out.contiguous()
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    if plain_causal and _cudnn_takes(q, v, softcap):
        dq, dk, dv = _by_cudnn(d_out, q, k, v, out, lse, scale)
        if sinks is None:
            return dq, dk, dv, None
        delta, lse2 = statistics(d_out, out, lse)
        return dq, dk, dv, _sink_gradient(delta, lse2, sinks, q.shape[1])
    delta, lse2 = statistics(d_out, out, lse)
    dq, dk, dv = gradients(d_out, q, k, v, delta, lse2, key_range, scale, softcap)
    return dq, dk, dv, None if sinks is None else _sink_gradient(delta, lse2, sinks, q.shape[1])


def statistics(d_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What each row of a backward needs, contiguous in T.

    Args: d_out, out: (B, T, H, Dv), the last dim contiguous. lse: (B, T, H), natural.
    Returns: delta = rowsum(d_out * out), and lse in base 2, a large number where it is -inf; each
        (B, H, T padded to a multiple of 128) float32, where pads hold 0 and a large number.
    """
    B, T, H, Dv = out.shape
    padded_t = triton.cdiv(T, STATISTICS.value) * STATISTICS.value
    delta = out.new_empty(B, H, padded_t, dtype=torch.float32)
    lse2 = torch.empty_like(delta)
    rows = 32
    _statistics[(B * triton.cdiv(padded_t, rows) * H,)](
        d_out,
        *d_out.stride()[:3],
        out,
        *out.stride()[:3],
        lse,
        *lse.stride(),
        delta,
        lse2,
        T,
        H=H,
        DV=Dv,
        PADDED_DV=triton.next_power_of_2(Dv),
        ROWS=rows,
        num_warps=4,
    )
    return delta, lse2


def _sink_gradient(delta: Tensor, lse2: Tensor, sinks: Tensor, num_queries: int) -> Tensor:
    """A sink only takes weight: d sink = -sum of its weight times delta."""
    weights = torch.exp2(sinks.float()[:, None] * LOG2_E.value - lse2[..., :num_queries])
    return -(weights * delta[..., :num_queries]).sum((0, 2)).to(sinks.dtype)


def _cudnn_takes(q: Tensor, v: Tensor, softcap: float | None) -> bool:
    return (
        q.is_cuda
        and torch.backends.cudnn.is_available()
        and q.shape[1] > 1  # it refuses a single query
        and q.dtype in (torch.bfloat16, torch.float16)
        and softcap is None
        and all(x.shape[3] <= 128 and x.shape[3] % 8 == 0 for x in (q, v))
    )


def _by_cudnn(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's backward, fed with our forward's results."""
    T, S = q.shape[1], k.shape[1]
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    d_out, q, k, v, out = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        d_out,
        q,
        k,
        v,
        out,
        lse.transpose(1, 2).contiguous()[..., None],
        no_dropout,
        no_dropout,
        None,
        None,
        None,
        T,
        S,
        0.0,
        True,
        scale=scale,
    )
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv


@triton.jit(do_not_specialize=["T", "stride_eb"])
def _statistics(
    d_out,
    stride_gb,
    stride_gt,
    stride_gh,
    out,
    stride_ob,
    stride_ot,
    stride_oh,
    lse,
    stride_eb,
    stride_et,
    stride_eh,
    delta,
    lse2,
    T,
    H: tl.constexpr,
    DV: tl.constexpr,
    PADDED_DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    padded_t = tl.cdiv(T, STATISTICS) * STATISTICS
    tiles = padded_t // ROWS
    tile = pid // H % tiles
    b = (pid // H // tiles).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < T
    t = tl.minimum(row, T - 1).to(tl.int64)
    d = tl.arange(0, PADDED_DV)
    given = inside[:, None] & (d < DV)[None, :]
    at = d_out + b * stride_gb + h * stride_gh + t[:, None] * stride_gt + d[None, :]
    product = tl.load(at, mask=given, other=0.0).to(tl.float32)
    at = out + b * stride_ob + h * stride_oh + t[:, None] * stride_ot + d[None, :]
    product *= tl.load(at, mask=given, other=0.0).to(tl.float32)
    log_total = tl.load(lse + b * stride_eb + t * stride_et + h * stride_eh)
    seeing = inside & (log_total != float("-inf"))
    at = (b * H + h) * padded_t + row
    tl.store(delta + at, tl.sum(product, 1))
    tl.store(lse2 + at, tl.where(seeing, log_total * LOG2_E, UNSEEING))
