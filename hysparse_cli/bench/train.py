"""Measures training: one step of one batch, forward and backward, without an optimizer."""

from typing import Any

import torch
from torch import Tensor

from hysparse_cli.bench.attention import AttentionPart
from hysparse_cli.bench.prefill import random_ids
from hysparse_cli.bench.timing import Marks, timed
from hysparse_cli.finetune.losses import next_token_sums


def measure_train(
    model: Any, part: AttentionPart, context: int, batch: int, seed: int, *, checkpointing: bool
) -> dict[str, Any]:
    """Milliseconds of one step on random tokens, and of its attention, forward and backward.

    checkpointing: activations are computed again for the gradient, which counts as attention too.
    """
    input_ids = random_ids(model, context, batch, seed)
    model.train()
    if checkpointing:
        _switch_checkpointing(model, "enable", {"use_reentrant": False})
    part.marks = Marks(input_ids.device)
    try:
        _, step = timed(lambda: _step(model, input_ids), input_ids.device)
        attention = sum(part.marks.spans_ms())
    finally:
        part.marks = None
        model.zero_grad()
        if checkpointing:
            _switch_checkpointing(model, "disable")
        model.eval()
    return {"steps_ms": [step], "attentions_ms": [attention]}


def _step(model: Any, input_ids: Tensor) -> None:
    """The next-token loss as ``hysparse finetune`` computes it, never holding all logits."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    batch: Any = {"input_ids": input_ids, "labels": input_ids, "position_ids": positions}
    next_token_sums(model, batch).total.backward()  # type: ignore[no-untyped-call]


def _switch_checkpointing(model: Any, what: str, *options: Any) -> None:
    """By transformers' method, which 5.17 has by its old name only."""
    new = getattr(model, f"activation_checkpointing_{what}", None)
    (new or getattr(model, f"gradient_checkpointing_{what}"))(*options)
