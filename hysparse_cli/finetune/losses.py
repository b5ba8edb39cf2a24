"""Next-token loss and logit distillation, without ever holding all logits.

Legend: B batch, T tokens, N targets, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hysparse_cli.finetune.data import IGNORED, Row
from hysparse_cli.logits import hidden_states, logits_of

CHUNK_LOGITS = 1 << 25  # logits of one chunk: 128 MiB in float32, a few times that while computed


class LossSums(NamedTuple):
    """Sums over targets, float32 scalars: nats of the next token, and of KL(teacher || model)."""

    next_token: Tensor
    distill: Tensor

    def mixed(self, distill_weight: float) -> Tensor:
        """What is minimised."""
        return (1 - distill_weight) * self.next_token + distill_weight * self.distill


def count_targets(batch: Row) -> int:
    """How many tokens of (B, T) labels are predicted: the first of a row is never."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def loss_sums(model: Any, batch: Row, teacher: Any | None = None) -> LossSums:
    """Losses of one packed batch.

        next_token = -sum log p(x_t+1)    distill = sum_t sum_v q(v) (log q(v) - log p(v))

    Logits are computed, and computed again for the gradient, for one chunk of targets at a time.

    Args:
        batch: what ``PackedRows`` yields, (B, T) each.
        teacher: gives q; without one ``distill`` is zero.
    """
    kept = batch["labels"][:, 1:] != IGNORED
    targets = batch["labels"][:, 1:][kept]  # [N]
    hidden = _at_targets(model, batch, kept)
    with torch.no_grad():
        teacher_hidden = None if teacher is None else _at_targets(teacher, batch, kept)
    chunk = max(1, CHUNK_LOGITS // model.config.vocab_size)
    total = torch.zeros(2, dtype=torch.float32, device=hidden.device)
    for begin in range(0, len(targets), chunk):
        part = slice(begin, begin + chunk)
        total = total + checkpoint(
            _chunk_sums,
            model,
            hidden[part],
            targets[part],
            teacher,
            None if teacher_hidden is None else teacher_hidden[part],
            use_reentrant=False,
        )
    return LossSums(*total.unbind())


def _at_targets(model: Any, batch: Row, kept: Tensor) -> Tensor:
    """(N, hidden): the states that predict the tokens where ``kept`` (B, T - 1)."""
    hidden = hidden_states(model, batch["input_ids"], position_ids=batch["position_ids"])
    return hidden[:, :-1][kept]


def _chunk_sums(
    model: Any,
    hidden: Tensor,
    targets: Tensor,
    teacher: Any,
    teacher_hidden: Tensor | None,
) -> Tensor:
    log_p = logits_of(model, hidden[None])[0].float().log_softmax(-1)  # [N, V]
    next_token = -log_p.gather(1, targets[:, None]).sum()
    if teacher_hidden is None:
        return torch.stack((next_token, torch.zeros_like(next_token)))
    with torch.no_grad():
        log_q = logits_of(teacher, teacher_hidden[None])[0].float().log_softmax(-1)  # [N, V]
    distill = torch.nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return torch.stack((next_token, distill))
