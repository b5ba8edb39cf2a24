"""Holds what was chosen of the dense model: full layers, and attention that trades places."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Selection:
    """What a strategy chose, and the paper's uniform pattern with as many full layers beside it."""

    strategy: str
    pattern: str
    score: float
    uniform_pattern: str
    uniform_score: float
    quantity: str
    higher_is_better: bool
    scores_file: str

    @property
    def better(self) -> bool:
        gain = self.score - self.uniform_score
        return gain > 0 if self.higher_is_better else gain < 0

    def line(self) -> str:
        verdict = "" if self.better else "; not better than uniform"
        return (
            f"{self.quantity}: {self.strategy} {self.pattern} {self.score:.4f}, "
            f"uniform {self.uniform_pattern} {self.uniform_score:.4f}{verdict}"
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "better_than_uniform": self.better}


@dataclass(frozen=True)
class Swaps:
    """``pairs`` of a full and a sparse layer whose attention trades places.

    need[l]: what the loss of planted answers (of all tokens where there are none) rises by, in
    nats, where the attention of layer l alone sees its window only; None where it was not measured.
    """

    pairs: tuple[tuple[int, int], ...]
    need: tuple[float, ...] | None

    def line(self) -> str:
        swaps = ", ".join(f"{full} with {sparse}" for full, sparse in self.pairs) or "none"
        if self.need is None:
            return f"attention swapped: {swaps}"
        most = sorted(enumerate(self.need), key=lambda item: -item[1])[:4]
        needs = ", ".join(f"{layer} ({nats:+.2f} nats)" for layer, nats in most)
        return f"attention swapped: {swaps}; layers that need far context most: {needs}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
