"""What a strategy chose, for people and for programs."""

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
