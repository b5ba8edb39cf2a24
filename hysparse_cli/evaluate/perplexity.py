"""Loss on text, in nats per token."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hysparse_cli.evaluate.statistics import Sample
from hysparse_cli.model.losses import token_losses
from hysparse_cli.texts.documents.pieces import encode

POSITION_PARTS = 8


class Window(NamedTuple):
    """Token ids that a model reads on their own; those from ``begin`` on (1 at least) count."""

    ids: list[int]
    begin: int = 1


@dataclass(frozen=True)
class Loss:
    """The mean of ``-log p(token | the tokens before it in its window)``, natural logarithm.

    windows: the losses of the counted tokens, by window. parts: the same by place in the window, in
    POSITION_PARTS equal parts of the windows of full length; none where those are too short.
    full_length: tokens of the longest window.
    """

    windows: Sample
    parts: list[Sample]
    full_length: int

    @property
    def nats_per_token(self) -> float:
        return self.windows.mean

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return self.windows.count

    @property
    def by_position(self) -> tuple[float, ...]:
        """The mean in each of ``parts``; NaN where no token of a part counts."""
        return tuple(part.mean for part in self.parts)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf


def cut_windows(
    documents: Iterable[str],
    tokenizer: Any,
    sequence_tokens: int,
    max_tokens: int | None,
    stride: int | None = None,
) -> list[Window]:
    """Documents as windows of token ids, each read by the model on its own.

    Each document is tokenized as a whole (documents/pieces.py), special tokens as the tokenizer
    adds them. Its windows of ``sequence_tokens`` begin ``stride`` tokens apart, and the last one
    may be shorter. A token counts in the first window that predicts it: with a stride shorter than
    the window, all but those of a document's first window have at least ``sequence_tokens -
    stride`` tokens before them (the sliding window of Hugging Face's guide to perplexity). Windows
    are never filled up from the next document, and nothing marks that a window goes on with a
    document.

    Args:
        max_tokens: take windows at even distances over all text, up to about so many tokens read
            and at least one window; None takes all.
        stride: None is ``sequence_tokens``: windows that do not overlap.
    """
    step = stride or sequence_tokens
    windows = []
    for document in documents:
        ids = encode(tokenizer, document)
        counted = 0  # tokens of the document up to the last window's end
        for first in range(0, len(ids), step):
            window = Window(ids[first : first + sequence_tokens], max(1, counted - first))
            if window.begin < len(window.ids):
                windows.append(window)
            counted = first + len(window.ids)
            if counted == len(ids):
                break
    total = sum(len(window.ids) for window in windows)
    if max_tokens is None or total <= max_tokens:
        return windows
    kept = max(1, int(len(windows) * max_tokens / total))
    return [windows[i * len(windows) // kept] for i in range(kept)]


@torch.no_grad()
def measure_loss(
    model: Any,
    windows: Sequence[Window],
    batch_size: int,
    on_progress: Callable[[int, int], None],
) -> Loss:
    """The loss of ``model`` on ``windows``; those of equal length share a batch."""
    full_length = max(len(window.ids) for window in windows)
    num_parts = POSITION_PARTS if full_length > POSITION_PARTS else 0
    total, parts = Sample([], []), [Sample([], []) for _ in range(num_parts)]
    batches = _batches(windows, batch_size)
    for done, batch in enumerate(batches):
        on_progress(done, len(batches))
        input_ids = torch.tensor([window.ids for window in batch], device=model.device)
        for window, losses in zip(batch, token_losses(model, input_ids).cpu(), strict=True):
            _add(total, losses, window.begin)
            if len(window.ids) == full_length:
                first = 1
                for part, of_part in zip(parts, losses.tensor_split(POSITION_PARTS), strict=False):
                    _add(part, of_part, max(1, window.begin - first + 1))
                    first += len(of_part)
    on_progress(len(batches), len(batches))
    return Loss(total, parts, full_length)


def _add(sample: Sample, losses: Tensor, begin: int) -> None:
    """Add a piece: ``losses`` of the tokens from 1 on, of which those from ``begin`` on count."""
    counted = losses[begin - 1 :].double()
    sample.sums.append(float(counted.sum()))
    sample.counts.append(len(counted))


def _batches(windows: Sequence[Window], batch_size: int) -> list[list[Window]]:
    batches: list[list[Window]] = []
    for window in sorted(windows, key=lambda window: len(window.ids)):
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and len(last[0].ids) == len(window.ids):
            last.append(window)
        else:
            batches.append([window])
    return batches
