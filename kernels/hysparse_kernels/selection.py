"""Scores and selects key blocks in plain torch (HySparse eq. 2-3): a part of the specification.

Shape suffixes as in reference.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hysparse_kernels.key_range import KeyRange


def log_block_scores(logits: Tensor, total: Tensor, key_range: KeyRange, block_size: int) -> Tensor:
    """The log of eq. 3: of each block the maximum over its keys and its group's heads.

    Args:
        logits: (B, T, G, R, S), -inf where unseen. total: (B, T, G, R, 1), the denominator.
    Returns: (B, T, G, N), -inf where a block is unseen.
    """
    S = logits.shape[-1]
    if key_range.first is not None:  # bring each query's first key to column 0
        columns = torch.arange(S, device=logits.device) + key_range.first[..., None]
        beyond = (columns >= S)[:, :, None, None]
        columns = columns.clamp(max=max(0, S - 1))[:, :, None, None].expand_as(logits)
        logits = logits.gather(-1, columns).masked_fill(beyond, -torch.inf)
    padded = F.pad(logits, (0, -S % block_size), value=-torch.inf)
    blocks = padded.shape[-1] // block_size
    best = padded.reshape(*padded.shape[:-1], blocks, block_size).amax(-1)
    scores: Tensor = (best - total.log()).amax(3)
    return scores


def select_blocks(log_scores: Tensor, top_k_blocks: int) -> Tensor:
    """The ``top_k_blocks`` best blocks of ``log_scores`` (..., N), ascending, -1 pads at the end.

    A block of score -inf is never selected; ties go to the earlier block.
    """
    num_blocks = log_scores.shape[-1]
    kept = min(top_k_blocks, num_blocks)
    best, order = log_scores.sort(dim=-1, descending=True, stable=True)
    chosen = order[..., :kept].masked_fill(best[..., :kept].isneginf(), num_blocks)
    chosen = chosen.sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == num_blocks, -1).int()
    return F.pad(chosen, (0, top_k_blocks - kept), value=-1)


def distinct(block_idx: Tensor, num_blocks: int) -> Tensor:
    """Lists (..., K) as sets: what is no block, or there already, is -1; no more than N entries."""
    no_block = (block_idx < 0) | (block_idx >= num_blocks)
    block_idx = block_idx.masked_fill(no_block, -1).sort(dim=-1, descending=True).values
    repeats = block_idx[..., 1:] == block_idx[..., :-1]
    block_idx[..., 1:] = block_idx[..., 1:].masked_fill(repeats, -1)
    if block_idx.shape[-1] > num_blocks:
        block_idx = block_idx.sort(dim=-1, descending=True).values[..., :num_blocks]
    return block_idx
