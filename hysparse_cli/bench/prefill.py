"""Prefill: reading a prompt and choosing the first token (TTFT)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Prefilled(NamedTuple):
    """next_ids: (B, 1), the most likely next tokens. cache: transformers' Cache of the prompt."""

    next_ids: Tensor
    cache: Any


@torch.inference_mode()
def prefill(model: Any, input_ids: Tensor) -> Prefilled:
    """Read input_ids (B, T) as ``generate()`` does: logits of the last position only."""
    output = model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
    return Prefilled(output.logits[:, -1:].argmax(-1), output.past_key_values)
