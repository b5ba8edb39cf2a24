"""Logits of chosen positions only: with a large vocabulary, those of all do not fit in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast


def hidden_states(model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Tensor:
    """What the language model's head reads.

    Args:
        input_ids: (B, T).
    Returns: (B, T, hidden).
    """
    output: Any = decoder_of(model)(input_ids=input_ids, use_cache=False, **options)
    states: Tensor = output.last_hidden_state
    return states


def layer_states(model: PreTrainedModel, input_ids: Tensor, **options: Any) -> list[Tensor]:
    """The hidden states after each decoder layer, those after the last normalised.

    Args:
        input_ids: (B, T).
    Returns: as many (B, T, hidden) as there are layers; the last is what ``hidden_states`` gives.
    """
    output: Any = decoder_of(model)(
        input_ids=input_ids, use_cache=False, output_hidden_states=True, **options
    )
    return list(output.hidden_states[1:])


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The logits of ``hidden``, computed by the model's own forward.

    So a family's scaling or capping of its logits is neither forgotten nor written twice.

    Args:
        hidden: (B, t, hidden), any positions of ``hidden_states``.
    Returns: (B, t, vocabulary).
    """
    placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with _decoder_gives(model, hidden):
        output: Any = model(input_ids=placeholder, use_cache=False)
    logits: Tensor = output.logits
    return logits


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    return model.get_submodule(model.base_model_prefix)


class _Given(nn.Module):
    def __init__(self, hidden: Tensor):
        super().__init__()
        self.output = MoeModelOutputWithPast(last_hidden_state=hidden)

    def forward(self, *args: Any, **inputs: Any) -> MoeModelOutputWithPast:
        return self.output


@contextmanager
def _decoder_gives(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    decoder = decoder_of(model)
    setattr(model, model.base_model_prefix, _Given(hidden))
    try:
        yield
    finally:
        setattr(model, model.base_model_prefix, decoder)
