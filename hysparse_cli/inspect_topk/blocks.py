"""Sums a layer's attention by key block, a slab of queries at a time.

Shape suffixes as in hysparse_kernels.reference; t is the queries of one slab. The batch is 1, every
query sees all keys up to its own, and no map of queries by keys is larger than a slab.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of one slab: what a CPU caches, what a GPU holds a few times over.
SLAB_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 28}


class LayerInputs(NamedTuple):
    """One layer's attention. q: (1, T, H, D). k: (1, T, G, D). sinks: (H,), the family's own."""

    q: Tensor
    k: Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


class Sizes(NamedTuple):
    """Of blocks, selection and window."""

    block_size: int
    top_k_blocks: int
    window_tokens: int

    @property
    def first_choice(self) -> int:
        """The first query that sees more blocks than are kept."""
        return self.top_k_blocks * self.block_size


class BlockShares(NamedTuple):
    """The attention of queries ``begin`` to ``end`` by key block, float32 (float64 stays).

    mass: (t, H, N), each block's part of the softmax over all keys a query sees; what is missing
    from 1 went to the family's own sink. window: (t, H, N), the part of it within the sliding
    window. log_score: (t, G, N), log of eq. 3, -inf where unseen. lse: (t, H).
    """

    begin: int
    end: int
    mass: Tensor
    window: Tensor
    log_score: Tensor
    lse: Tensor


def block_shares(inputs: LayerInputs, sizes: Sizes) -> Iterator[BlockShares]:
    """Go through all queries; every slab has all N blocks."""
    q, k = _accumulate(inputs.q[0]) * inputs.scale, _accumulate(inputs.k[0])
    T, H, _ = q.shape
    N = num_blocks(T, sizes.block_size)
    k = F.pad(k, (0, 0, 0, 0, 0, N * sizes.block_size - T))
    G, D = k.shape[1:]
    q_GTRD, k_GDS = q.view(T, G, H // G, D).transpose(0, 1), k.permute(1, 2, 0)
    slab = max(1, SLAB_LOGITS[q.device.type] // (H * T))
    for begin in range(0, T, slab):
        end = min(begin + slab, T)
        seen = num_blocks(end, sizes.block_size) * sizes.block_size
        logits = q_GTRD[:, begin:end].flatten(1, 2) @ k_GDS[..., :seen]
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        by_query = logits.view(G, end - begin, H // G, seen).transpose(0, 1)  # [t, G, R, S]
        yield _reduced(by_query, begin, N, sizes, inputs.sinks)


def even_blocks(queries: Tensor, sizes: Sizes) -> Tensor:
    """(t, K): as many blocks at even distances, from the first to the query's own.

    Args:
        queries: (t,) positions that see at least as many blocks.
    """
    own = queries[:, None] // sizes.block_size
    step = torch.arange(sizes.top_k_blocks, device=queries.device)
    return own * step // max(1, sizes.top_k_blocks - 1)


def on_blocks(values: Tensor, block_idx: Tensor) -> Tensor:
    """Sum ``values`` (t, H, N) over each group's blocks (t, G, K), -1 pads: (t, H)."""
    repeats = values.shape[1] // block_idx.shape[1]
    idx = block_idx.long().repeat_interleave(repeats, 1)
    return values.gather(2, idx.clamp(min=0)).masked_fill(idx < 0, 0).sum(-1)


def num_blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _reduced(logits: Tensor, begin: int, N: int, sizes: Sizes, sinks: Tensor | None) -> BlockShares:
    t, G, R, S = logits.shape
    queries = torch.arange(begin, begin + t, device=logits.device)[:, None]
    keys = torch.arange(S, device=logits.device)
    logits = logits.masked_fill((keys > queries)[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(G, R, 1))
    by_block = (t, G, R, -1, sizes.block_size)
    score = (logits.view(by_block).amax(-1) - lse).amax(2)
    shares = (logits - lse).exp_()
    mass = shares.view(by_block).sum(-1)
    near = max(0, begin - sizes.window_tokens + 1) // sizes.block_size  # first block in a window
    recent = keys[near * sizes.block_size :] > queries - sizes.window_tokens
    window = (shares[..., near * sizes.block_size :] * recent[:, None, None]).view(by_block)
    beyond = N - S // sizes.block_size
    return BlockShares(
        begin,
        begin + t,
        F.pad(mass, (0, beyond)).flatten(1, 2),
        F.pad(window.sum(-1), (near, beyond)).flatten(1, 2),
        F.pad(score, (0, beyond), value=-torch.inf),
        lse.flatten(1),
    )


def _accumulate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
