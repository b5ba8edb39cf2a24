"""Lists the strategies that place a number of full layers by what was measured.

``uniform`` needs no scores (pattern.py); ``manual`` is a pattern that is given. Imports no torch:
the recipe takes the names from here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hysparse_cli.pattern import Pattern
from hysparse_cli.placement.dp import Weights, best_pattern, weight_of
from hysparse_cli.placement.search import greedy_path, restore_path

if TYPE_CHECKING:
    from hysparse_cli.placement.overlap import Overlap
    from hysparse_cli.placement.scores import Scores

# On a real model of 12 layers, over its patterns with 4 full ones, this sum and the measured KL to
# dense have a rank correlation of about .9 with 1 to 4; without damage it is below .5.
DAMAGE_WEIGHT = 2.0


@dataclass(frozen=True)
class Strategy:
    """pick: the pattern with so many full layers. score: of any pattern, ``quantity`` says what.

    path and metric: how a strategy that searches goes, and by which measured quality.
    """

    quantity: str
    higher_is_better: bool
    pick: "Callable[[Scores, int], str]"
    score: "Callable[[Scores, str], float]"
    path: Callable[[int, Callable[[str], float]], list[str]] | None = None
    metric: str = ""


def overlap_weights(overlap: "Overlap") -> Weights:
    """What each layer is worth under each server, of a total of 1 where all are full.

    weights[a][b] = importance[b] * (similarity[a][b] - DAMAGE_WEIGHT * damage[a][b])
    """
    total = sum(overlap.importance)
    layers = range(len(overlap.importance))
    return [
        [
            overlap.importance[b]
            / total
            * (1.0 if a == b else overlap.similarity[a][b] - DAMAGE_WEIGHT * overlap.damage[a][b])
            for b in layers
        ]
        for a in layers
    ]


def _best(scores: "Scores", num_full: int) -> str:
    return best_pattern(overlap_weights(scores.overlap), num_full)


def _weight(scores: "Scores", pattern: str) -> float:
    return weight_of(overlap_weights(scores.overlap), pattern)


def _searching(
    name: str, metric: str, path: Callable[[int, Callable[[str], float]], list[str]], quantity: str
) -> Strategy:
    return Strategy(
        quantity=quantity,
        higher_is_better=False,
        pick=lambda scores, num_full: next(
            pattern
            for pattern in scores.paths[name]
            if len(Pattern(pattern).full_layers) == num_full
        ),
        score=lambda scores, pattern: scores.losses[pattern][metric],
        path=path,
        metric=metric,
    )


STRATEGIES: dict[str, Strategy] = {
    "dp": Strategy("overlap kept, less damage", True, _best, _weight),
    "greedy": _searching("greedy", "loss", greedy_path, "calibration loss"),
    "kl": _searching("kl", "kl", restore_path, "KL to dense"),
}
