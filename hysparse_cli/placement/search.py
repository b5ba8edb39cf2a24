"""Paths of patterns from full to sparse and back, one layer a step, by measured quality."""

from collections.abc import Callable

from hysparse_cli.pattern import FULL, SPARSE

Cost = Callable[[str], float]


def greedy_path(num_layers: int, cost: Cost) -> list[str]:
    """Patterns from all full to the fewest, each one layer sparser: the one of least cost.

    Layer 0 and the last stay full.
    """
    return _path(num_layers, cost, FULL, SPARSE)


def restore_path(num_layers: int, cost: Cost) -> list[str]:
    """Patterns from the fewest full layers to all, each one layer fuller: the one of least cost."""
    return _path(num_layers, cost, SPARSE, FULL)


def path_steps(num_layers: int) -> int:
    """How many patterns a path looks at."""
    inner = max(0, num_layers - 2)
    return 1 + inner * (inner + 1) // 2


def _path(num_layers: int, cost: Cost, before: str, after: str) -> list[str]:
    pattern = FULL * num_layers
    pattern = pattern[:1] + before * (num_layers - 2) + pattern[1:][-1:]
    cost(pattern)
    path = [pattern]
    while before in pattern[1:-1]:
        steps = [
            pattern[:layer] + after + pattern[layer + 1 :]
            for layer in range(1, num_layers - 1)
            if pattern[layer] == before
        ]
        pattern = min(steps, key=cost)
        path.append(pattern)
    return path
