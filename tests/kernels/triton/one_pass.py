"""One small pass of each kernel, forward and backward: what ``make sanitize`` runs.

python -m tests.kernels.triton.one_pass memory|races
"""

import sys

import torch
from torch import Tensor

import hysparse_kernels as ops
from hysparse_kernels import KeyRange, causal

BLOCK, TOP, WINDOW = 64, 4, 128
# Queries, head dim, packed. Head dim 128 runs the Hopper kernels, 80 the others; packed documents
# run our own backward, not cuDNN's; a single query runs the decode kernels. racecheck does not know
# how warps wait for each other in warp-specialised kernels: it reports ours and cuDNN's alike.
PLAIN = ((300, 80, True), (1, 80, False))
PASSES = {
    "memory": (*PLAIN, (300, 80, False), (300, 128, True), (300, 128, False), (1, 128, False)),
    "races": PLAIN,
}


def one_pass(queries: int, dim: int, packed: bool) -> None:
    tokens, group, kv_heads = 300, 4, 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q = draw(1, queries, group * kv_heads, dim)
    k, v, own_k, own_v = (draw(1, tokens, kv_heads, dim) for _ in range(4))
    gate_logits = draw(1, queries, group * kv_heads, 2)
    sinks = torch.randn(group * kv_heads, 2, device="cuda").requires_grad_()
    seen = causal(queries, tokens, q.device)
    if packed:
        first = torch.where(seen.last < 100, 0, 100)
        seen = KeyRange(first, seen.last)
    full = ops.full_attention(q, k, v, block_size=BLOCK, top_k_blocks=TOP, key_range=seen)
    assert full.block_idx is not None

    def sparse_layer() -> Tensor:
        assert full.block_idx is not None
        return ops.sparse_layer_attention(
            q,
            k,
            v,
            full.block_idx,
            own_k,
            own_v,
            gate_logits,
            block_size=BLOCK,
            window_tokens=WINDOW,
            sinks=sinks,
            key_range=seen,
            window_range=seen,
        )

    (full.out + sparse_layer()).sum().backward()
    with torch.no_grad():
        sparse_layer()
    torch.cuda.synchronize()


if __name__ == "__main__":
    for queries, dim, packed in PASSES[sys.argv[1]]:
        one_pass(queries, dim, packed)
