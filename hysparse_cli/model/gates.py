"""The kinds of gate, one row each: how gate logits weigh the two branches of a sparse layer.

A new kind of gate is a row here, named by a kind of sparse layer (kinds.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """A learned gate of the block-sparse and the SWA branch.

    logits_per_head: outputs of ``hysparse.gate`` for each query head; its rows are head-major.
    weights: logits (..., H, logits_per_head) -> (..., H, 2), the weight of each branch in [0, 1].
    logits: the inverse, of weights kept a given distance away from 0 and 1.
    fused: whether the kernels of ``sparse_layer_attention`` compute it.
    """

    logits_per_head: int
    weights: "Callable[[Tensor], Tensor]"
    logits: "Callable[[Tensor, float], Tensor]"
    fused: bool


def _sigmoid(logits: "Tensor") -> "Tensor":
    """The paper's gates (eq. 8), one of its own for each branch."""
    return logits.sigmoid()


def _logit(weights: "Tensor", margin: float) -> "Tensor":
    return weights.logit(eps=margin)


GATES: dict[str, Gate] = {
    "sigmoid": Gate(logits_per_head=2, weights=_sigmoid, logits=_logit, fused=True),
}
