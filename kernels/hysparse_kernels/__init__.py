"""HySparse attention ops: a pure-torch specification, and backends held to it."""

from hysparse_kernels.key_range import KeyRange, causal
from hysparse_kernels.ops import (
    block_sparse_attention,
    full_attention,
    gated_sum,
    sliding_window_attention,
    sparse_layer_attention,
)
from hysparse_kernels.outputs import Attention, FullAttention

__all__ = [
    "Attention",
    "FullAttention",
    "KeyRange",
    "block_sparse_attention",
    "causal",
    "full_attention",
    "gated_sum",
    "sliding_window_attention",
    "sparse_layer_attention",
]
