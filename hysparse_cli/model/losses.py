"""Computes losses of predicted tokens from a chunk of logits at a time.

Suffixes: B batch, T tokens of a row, N tokens of any rows, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hysparse_cli.model.logits import hidden_states, logits_of

CHUNK_LOGITS = 1 << 25  # logits of one chunk: 128 MiB in float32, a few times that while computed

T = TypeVar("T")


@torch.no_grad()
def token_losses(model: Any, input_ids: Tensor, **options: Any) -> Tensor:
    """The next-token loss of each token, -log p(x_t | the tokens before it).

    Args:
        input_ids: (B, T). options: what else the model's forward is given.
    Returns: (B, T - 1) float32, of tokens 1 to T - 1, in nats.
    """
    hidden, targets = hidden_states(model, input_ids, **options)[:, :-1], input_ids[:, 1:]
    of_chunk = partial(_losses_of_chunk, model)
    chunks = in_chunks(of_chunk, model, hidden.flatten(0, 1), targets.flatten())
    return torch.cat(chunks).view(targets.shape)


def in_chunks(of_chunk: Callable[..., T], model: Any, *tensors: Tensor) -> list[T]:
    """``of_chunk`` of one chunk of tokens after the other; gradients compute each again.

    So no more than CHUNK_LOGITS of the model's logits exist at a time.

    Args:
        of_chunk: is given a chunk of each of ``tensors``, which are (N, ...).
    Returns: what it gives, in order; nothing for no tokens.
    """
    size = max(1, CHUNK_LOGITS // model.config.vocab_size)
    found = []
    for begin in range(0, len(tensors[0]), size):
        chunk = [tensor[begin : begin + size] for tensor in tensors]
        if torch.is_grad_enabled():
            found.append(checkpoint(of_chunk, *chunk, use_reentrant=False))
        else:
            found.append(of_chunk(*chunk))
    return found


def log_probabilities(model: Any, hidden: Tensor) -> Tensor:
    """(N, hidden), as ``hidden_states`` gives them -> (N, V), float32."""
    return logits_of(model, hidden[None])[0].float().log_softmax(-1)


def next_token_losses(log_p: Tensor, targets: Tensor) -> Tensor:
    """(N, V) and (N,) -> (N,): -log p of each target."""
    return -log_p.gather(1, targets[:, None])[:, 0]


def _losses_of_chunk(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    return next_token_losses(log_probabilities(model, hidden), targets)
