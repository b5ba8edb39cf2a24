"""Next-token loss and distillation of logits and hidden states, never holding all logits.

Legend: B batch, T tokens, N targets, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hysparse_cli.finetune.data import IGNORED, Row
from hysparse_cli.finetune.part import Part, Processes
from hysparse_cli.model.logits import logits_of

CHUNK_LOGITS = 1 << 25  # logits of one chunk: 128 MiB in float32, a few times that while computed


class LossSums(NamedTuple):
    """Sums over a batch's targets, float32 scalars; 0 where not measured.

    Where processes split a batch's rows, each has a part of every sum.

    total: what is minimised. next_token: nats. distill: nats of KL(teacher || model). align and
    hidden: relative squared errors, each taken once for every target.
    """

    total: Tensor
    next_token: Tensor
    distill: Tensor
    align: Tensor
    hidden: Tensor


def count_targets(batch: Row) -> int:
    """How many tokens of (B, T) labels are predicted: the first of a row is never."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def next_token_sums(model: Any, batch: Row, processes: Processes = None) -> LossSums:
    """-sum log p(x_t+1) over the targets of a packed batch, (B, T) each."""
    part = Part(batch, processes)
    last = part.last_states(model)
    next_token, distill = _chunked_sums(model, last, part, None, None).unbind()
    zero = torch.zeros_like(next_token)
    return LossSums(next_token, next_token, distill, zero, zero)


def distill_sums(
    model: Any,
    batch: Row,
    teacher: Any,
    processes: Processes = None,
    *,
    distill_weight: float,
    hidden_weight: float,
) -> LossSums:
    """What makes the model more like its teacher on one packed batch.

        total = (1 - distill_weight) next_token + distill_weight distill + hidden_weight hidden
        distill = sum_t sum_v q(v) (log q(v) - log p(v))
        hidden = sum over rows of n mean over layers of ||h - h'||^2 / ||h'||^2

    The norms are over a row, of n targets, so that sums don't depend on how rows are batched.

    Logits are computed, and computed again for the gradient, for one chunk of targets at a time.

    Args:
        batch: what ``PackedRows`` yields, (B, T) each.
        teacher: gives q, and h' after each decoder layer (after the last: normalised).
        processes: that split the batch's rows, or None.
    """
    part, each_layer = Part(batch, processes), hidden_weight > 0
    states = _states(model, part, each_layer)
    with torch.no_grad():
        targets = _states(teacher, part, each_layer)
    sums = _chunked_sums(model, states[-1], part, teacher, targets[-1])
    next_token, distill = sums.unbind()
    total = (1 - distill_weight) * next_token + distill_weight * distill
    hidden = torch.zeros_like(total)
    if hidden_weight:
        hidden = weighted(
            part,
            [
                checkpoint(relative_error, state, target, part, use_reentrant=False)
                for state, target in zip(states, targets, strict=True)
            ],
        )
        total = total + hidden_weight * hidden
    return LossSums(total, next_token, distill, torch.zeros_like(total), hidden)


def relative_error(output: Tensor, target: Tensor, part: Part) -> Tensor:
    """(B,) ||output - target||^2 / ||target||^2 of each row of (B, t, hidden), in float32.

    ``target`` has no gradient. Its norm is the whole row's, the error that of ``part``.
    """
    target = target.detach().float()
    smallest = torch.finfo(torch.float32).tiny
    norms = part.total(target.square().sum((1, 2))).clamp_min(smallest)
    return (output.float() - target).square().sum((1, 2)) / norms


def weighted(part: Part, errors: Sequence[Tensor]) -> Tensor:
    """The mean of ``errors``, (B,) each, times each row's number of targets, summed."""
    return (part.num_targets * torch.stack(list(errors)).mean(0)).sum()


def _states(model: Any, part: Part, each_layer: bool) -> list[Tensor]:
    """(B, t, hidden) after each decoder layer, or after the last alone."""
    return part.states(model) if each_layer else [part.last_states(model)]


def _chunked_sums(
    model: Any, states: Tensor, part: Part, teacher: Any, teacher_states: Tensor | None
) -> Tensor:
    """(2,): the sums of next_token and distill; states are (B, t, hidden)."""
    kept = part.targets != IGNORED
    targets = part.targets[kept]  # [N]
    hidden = states[kept]  # [N, hidden]
    teacher_hidden = None if teacher_states is None else teacher_states[kept]
    chunk = max(1, CHUNK_LOGITS // model.config.vocab_size)
    nothing = hidden[:0].float().sum()  # 0, yet with a gradient where there are no targets
    total = torch.stack((nothing, nothing))
    for begin in range(0, len(targets), chunk):
        these = slice(begin, begin + chunk)
        total = total + checkpoint(
            _chunk_sums,
            model,
            hidden[these],
            targets[these],
            teacher,
            None if teacher_hidden is None else teacher_hidden[these],
            use_reentrant=False,
        )
    return total


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
