"""The paper's equations as loops over numbers, written apart from the reference."""

import math

import torch
from torch import Tensor


def softmax_over(
    q: Tensor, k: Tensor, keys: list[int], scale: float, sink: float | None, softcap: float | None
) -> dict[int, float]:
    """key -> probability (eq. 2), with an optional sink in the denominator."""
    logits = {}
    for i in keys:
        logit = scale * sum(float(a) * float(b) for a, b in zip(q, k[i], strict=True))
        logits[i] = softcap * math.tanh(logit / softcap) if softcap else logit
    total = sum(math.exp(logit) for logit in logits.values())
    total += math.exp(sink) if sink is not None else 0.0
    return {i: math.exp(logit) / total for i, logit in logits.items()}


def weighted(v: Tensor, probabilities: dict[int, float]) -> Tensor:
    out = torch.zeros(v.shape[-1], dtype=torch.float64)
    for i, p in probabilities.items():
        out += p * v[i].double()
    return out


def block_scores(
    per_head: list[dict[int, float]], first: int, num_blocks: int, block_size: int
) -> list[float]:
    """Eq. 3 and the group-wise maximum, over the heads of one group, for one query."""
    scores = [0.0] * num_blocks
    for probabilities in per_head:
        for i, p in probabilities.items():
            block = (i - first) // block_size
            scores[block] = max(scores[block], p)
    return scores


def best_blocks(scores: list[float], seen: set[int], k: int) -> list[int]:
    """The k seen blocks of largest score, ties to the earlier, ascending."""
    ranked = sorted(seen, key=lambda block: (-scores[block], block))
    return sorted(ranked[:k])
