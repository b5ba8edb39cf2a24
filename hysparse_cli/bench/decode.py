"""Decode: one token after another, greedily, from a prefilled cache (TPOT)."""

from typing import Any

import torch
from torch import Tensor

from hysparse_cli.bench.prefill import Prefilled


@torch.inference_mode()
def decode(model: Any, start: Prefilled, steps: int) -> Tensor:
    """``steps`` more tokens: the last ones, (B, 1)."""
    next_ids, cache = start
    for _ in range(steps):
        output = model(input_ids=next_ids, past_key_values=cache, use_cache=True)
        next_ids = output.logits[:, -1:].argmax(-1)
    return next_ids
