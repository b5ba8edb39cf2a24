"""Loss on text, in nats per token."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hysparse_cli.logits import hidden_states, logits_of

LOGITS_AT_ONCE = 1 << 26
POSITION_PARTS = 8


@dataclass(frozen=True)
class Loss:
    """The mean of ``-log p(token | the tokens before it in its window)``, natural logarithm.

    tokens: how many were predicted: all but the first of each of the ``windows``.
    by_position: the same mean in each of POSITION_PARTS equal parts of the windows of full length;
    none where there is no such window, or it is too short.
    """

    nats_per_token: float
    tokens: int
    windows: int
    by_position: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf


def cut_windows(
    documents: Iterable[str], tokenizer: Any, sequence_tokens: int, max_tokens: int | None
) -> list[list[int]]:
    """Documents as windows of token ids, each read by the model on its own.

    Each document is tokenized whole, special tokens as the tokenizer adds them, and cut into
    consecutive windows of ``sequence_tokens`` that do not overlap; the last one may be shorter, and
    is left out below 2 tokens. Windows are never filled up from the next document, and nothing
    marks that a window goes on with a document.

    Args:
        max_tokens: take windows at even distances over all text, up to about so many tokens and at
            least one window; None takes all.
    """
    windows = []
    for document in documents:
        ids = tokenizer(document, verbose=False)["input_ids"]
        cuts = (ids[i : i + sequence_tokens] for i in range(0, len(ids), sequence_tokens))
        windows += [window for window in cuts if len(window) > 1]
    total = sum(map(len, windows))
    if max_tokens is None or total <= max_tokens:
        return windows
    kept = max(1, int(len(windows) * max_tokens / total))
    return [windows[i * len(windows) // kept] for i in range(kept)]


@torch.no_grad()
def measure_loss(
    model: Any,
    windows: Sequence[list[int]],
    batch_size: int,
    on_progress: Callable[[int, int], None],
) -> Loss:
    """The loss of ``model`` on ``windows``; those of equal length share a batch."""
    total, tokens = 0.0, 0
    full_length = max(map(len, windows))
    by_token = torch.zeros(full_length - 1, dtype=torch.float64)  # of windows of full length
    batches = _batches(windows, batch_size)
    for done, batch in enumerate(batches):
        on_progress(done, len(batches))
        input_ids = torch.tensor(batch, device=model.device)
        losses = token_losses(model, input_ids).double().sum(0).cpu()
        total += float(losses.sum())
        tokens += input_ids[:, 1:].numel()
        if len(losses) == len(by_token):
            by_token += losses
    on_progress(len(batches), len(batches))
    whole = sum(len(window) == full_length for window in windows)
    return Loss(total / tokens, tokens, len(windows), _by_position(by_token / whole))


@torch.no_grad()
def token_losses(model: Any, input_ids: Tensor, **options: Any) -> Tensor:
    """The loss of each predicted token, logits a stretch at a time.

    Args:
        input_ids: (B, T). options: what else the model's forward is given.
    Returns: (B, T - 1) float32, of tokens 1 to T - 1, in nats.
    """
    hidden, labels = hidden_states(model, input_ids, **options)[:, :-1], input_ids[:, 1:]
    stretch = max(1, LOGITS_AT_ONCE // (model.config.vocab_size * len(input_ids)))
    parts = []
    for begin in range(0, labels.shape[1], stretch):
        logits = logits_of(model, hidden[:, begin : begin + stretch]).float()
        answers = labels[:, begin : begin + stretch]
        parts.append(F.cross_entropy(logits.transpose(1, 2), answers, reduction="none"))
    return torch.cat(parts, dim=1)


def _by_position(losses: Tensor) -> tuple[float, ...]:
    if len(losses) < POSITION_PARTS:
        return ()
    return tuple(float(part.mean()) for part in losses.tensor_split(POSITION_PARTS))


def _batches(windows: Sequence[list[int]], batch_size: int) -> list[list[list[int]]]:
    batches: list[list[list[int]]] = []
    for window in sorted(windows, key=len):
        room = batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(window)
        if room:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches
