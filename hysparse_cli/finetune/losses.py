"""Computes the losses that the objectives of a run are made of, never holding all logits.

Suffixes: B batch, t tokens that a process computes, N targets, V vocabulary, C hidden size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from hysparse_cli.finetune.context_parallel import LocalBatch
from hysparse_cli.finetune.data import IGNORED, Row
from hysparse_cli.model.losses import in_chunks, log_probabilities, next_token_losses

# every loss that a step may report, and its name for people
LOSSES = {
    "next_token_loss": "next-token loss",
    "distill_loss": "KL to teacher",
    "align_loss": "attention error",
    "hidden_loss": "hidden state error",
}


class LossSums(NamedTuple):
    """Sums over a batch's targets, float32 scalars.

    Their common count is that of the targets, which the gradient needs before any is computed.
    Where context-parallel processes compute a batch, each has an addend of every sum.

    total: what is minimised. measured: by the names of LOSSES, only those that were measured.
    """

    total: Tensor
    measured: dict[str, Tensor]


def count_targets(batch: Row) -> int:
    """How many tokens of (B, T) labels are predicted: the first of a row is never."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def next_token_sums(model: Any, batch: LocalBatch) -> LossSums:
    """-sum log p(x_t+1) over the targets, in nats."""
    (next_token,) = _sums(partial(_next_token, model), 1, model, batch, batch.last_states(model))
    return LossSums(next_token, {"next_token_loss": next_token})


def distill_sums(
    model: Any, batch: LocalBatch, teacher: Any, *, distill_weight: float, hidden_weight: float
) -> LossSums:
    """What makes the model more like its teacher.

        distill = sum over targets of KL(q || p)
        hidden  = sum over rows of n mean over layers of ||h - h'||^2 / ||h'||^2
        total   = (1 - distill_weight) next_token + distill_weight distill + hidden_weight hidden

    with norms over a row of n targets, so that sums don't depend on how rows are batched. Logits
    are computed, and computed again for the gradient, for one chunk of targets at a time.

    Args:
        teacher: gives q, and h' after each decoder layer (after the last: normalised).
    """
    states = _states(model, batch, each_layer=hidden_weight > 0)
    with torch.no_grad():
        targets = _states(teacher, batch, each_layer=hidden_weight > 0)
    both = partial(_next_token_and_distill, model, teacher)
    next_token, distill = _sums(both, 2, model, batch, states[-1], targets[-1])
    total = (1 - distill_weight) * next_token + distill_weight * distill
    measured = {"next_token_loss": next_token, "distill_loss": distill}
    if hidden_weight:
        errors = [
            checkpoint(relative_error, state, target, batch, use_reentrant=False)
            for state, target in zip(states, targets, strict=True)
        ]
        measured["hidden_loss"] = weighted(batch, errors)
        total = total + hidden_weight * measured["hidden_loss"]
    return LossSums(total, measured)


def relative_error(output: Tensor, target: Tensor, batch: LocalBatch) -> Tensor:
    """(B,) ||output - target||^2 / ||target||^2 of each row of (B, t, C), in float32.

    ``target`` has no gradient. Its norm is the whole row's, the error that of the local tokens.
    """
    target = target.detach().float()
    smallest = torch.finfo(torch.float32).tiny
    norms = batch.total(target.square().sum((1, 2))).clamp_min(smallest)
    return (output.float() - target).square().sum((1, 2)) / norms


def weighted(batch: LocalBatch, errors: Sequence[Tensor]) -> Tensor:
    """The mean of ``errors``, (B,) each, times each row's number of targets, summed."""
    return (batch.num_targets * torch.stack(list(errors)).mean(0)).sum()


def _states(model: Any, batch: LocalBatch, *, each_layer: bool) -> list[Tensor]:
    """(B, t, C) after each decoder layer, or only after the last."""
    return batch.states(model) if each_layer else [batch.last_states(model)]


def _sums(of_chunk: Any, num_losses: int, model: Any, batch: LocalBatch, *states: Tensor) -> Tensor:
    """(num_losses,): the sums of ``of_chunk`` over the targets; ``states`` are (B, t, C)."""
    kept = batch.targets != IGNORED
    hidden = [state[kept] for state in states]  # [N, C] each
    nothing = hidden[0][:0].float().sum()  # 0, yet with a gradient where there are no targets
    chunks = in_chunks(of_chunk, model, batch.targets[kept], *hidden)
    return sum(chunks, start=nothing.expand(num_losses))


def _next_token(model: Any, targets: Tensor, hidden: Tensor) -> Tensor:
    return next_token_losses(log_probabilities(model, hidden), targets).sum()[None]


def _next_token_and_distill(
    model: Any, teacher: Any, targets: Tensor, hidden: Tensor, teacher_hidden: Tensor
) -> Tensor:
    log_p = log_probabilities(model, hidden)  # [N, V]
    with torch.no_grad():
        log_q = log_probabilities(teacher, teacher_hidden)  # [N, V]
    distill = kl_div(log_p, log_q, reduction="sum", log_target=True)
    return torch.stack((next_token_losses(log_p, targets).sum(), distill))
