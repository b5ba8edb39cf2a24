"""Calls other people's attention as ours is called: q (B, T, H, D), k and v (B, S, G, D) in.

Each function imports what it needs when it is called, and raises whatever that raises: the row of
the table then names the reason.
"""

from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN, FLASH = "cuDNN", "FlashAttention 2"
FLA_NSA, XUNHAO_NSA, FLA_WINDOW = "fla NSA", "XunhaoLai NSA", "fla parallel_attn"
UNSELECTED, TORCH_TOPK = "the same without TopK", "torch.topk alone"


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's SDPA by cuDNN: causal, or all keys for one query."""
    return _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's SDPA by FlashAttention 2."""
    return _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v)


def fla_nsa(q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, *, block_size: int) -> Tensor:
    """The selected branch of NSA in flash-linear-attention (PyPI: fla-core, einops)."""
    attend = import_module("fla.ops.nsa.parallel").ParallelNSAFunction.apply
    num_blocks, scale = block_idx.shape[-1], q.shape[-1] ** -0.5
    out: Tensor = attend(q, k, v, block_idx, num_blocks, block_size, scale, None)
    return out


def fla_window(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *, window_tokens: int) -> Tensor:
    """Sliding window attention with sinks in flash-linear-attention."""
    attend = import_module("fla.ops.attn.parallel").parallel_attn
    out: Tensor = attend(q, k, v, window_size=window_tokens, sink_bias=sinks)
    return out


def xunhao_nsa(
    q: Tensor, k: Tensor, v: Tensor, by_head: Tensor, ends: Tensor, *, block_size: int
) -> Tensor:
    """The selected branch of github.com/XunhaoLai/native-sparse-attention-triton.

    by_head: (G, T, K), block_idx as it wants it. ends: [0, T] int32.
    """
    module = import_module("native_sparse_attention.ops.triton.topk_sparse_attention")
    out: Tensor = module.topk_sparse_attention(q[0], k[0], v[0], by_head, block_size, ends)
    return out[None]


def _sdpa(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
    return out.transpose(1, 2)
