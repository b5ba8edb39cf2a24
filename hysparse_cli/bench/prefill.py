"""Measures prefill: reading a prompt and choosing the first token (TTFT)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hysparse_cli.bench.attention import AttentionPart
from hysparse_cli.bench.timing import Marks, timed
from hysparse_cli.model.kv_cache import held_kv_bytes


class Prefilled(NamedTuple):
    """next_ids: (B, 1), the most likely next tokens. cache: transformers' Cache of the prompt."""

    next_ids: Tensor
    cache: Any


@torch.inference_mode()
def prefill(model: Any, input_ids: Tensor) -> Prefilled:
    """Read input_ids (B, T) as ``generate()`` does: logits of the last position only."""
    output = model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
    return Prefilled(output.logits[:, -1:].argmax(-1), output.past_key_values)


def measure_prefill(
    model: Any, part: AttentionPart, context: int, batch: int, seed: int
) -> dict[str, Any]:
    """Milliseconds of one prefill of random tokens and of its attention; KV bytes held after it."""
    input_ids = random_ids(model, context, batch, seed)
    part.marks = Marks(input_ids.device)
    start, ttft = timed(lambda: prefill(model, input_ids), input_ids.device)
    attention, part.marks = sum(part.marks.spans_ms()), None
    held = held_kv_bytes(start.cache)
    return {"ttfts_ms": [ttft], "attentions_ms": [attention], "kv_bytes": held}


def random_ids(model: Any, context: int, batch: int, seed: int) -> Tensor:
    """(B, T) tokens drawn at random."""
    chance = torch.Generator(model.device).manual_seed(seed)
    shape = (batch, context)
    return torch.randint(model.config.vocab_size, shape, generator=chance, device=chance.device)
