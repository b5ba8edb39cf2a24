"""Holds selected blocks to the best there are, by their scores: which of two equals, is free."""

import torch
from torch import Tensor


def shortfall(found: Tensor, best: Tensor) -> float:
    """The largest part by which ``found`` differs from ``best``, descending float64 scores."""
    return float(((found - best) / best.clamp(min=torch.finfo(best.dtype).tiny)).abs().max())


def scores_of(block_idx: Tensor, scores: Tensor) -> Tensor:
    """The scores of these blocks, descending; 0 for a pad or what is no block.

    Args: block_idx: (..., K) integers. scores: (..., N). Returns: (..., K) in scores' dtype.
    """
    num_blocks = scores.shape[-1]
    found = scores.gather(-1, block_idx.long().clamp(0, num_blocks - 1))
    none = (block_idx < 0) | (block_idx >= num_blocks)
    return found.masked_fill(none, 0).sort(dim=-1, descending=True).values
