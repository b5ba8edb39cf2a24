"""Walks from full to sparse patterns and back, one layer a step, by measured quality."""

from collections.abc import Callable

from hysparse_cli.pattern import from_full_layers

Cost = Callable[[str], float]


def greedy_path(num_layers: int, cost: Cost) -> list[str]:
    """Patterns from all full to the fewest, each one layer sparser: the one of least cost.

    Layer 0 and the last stay full.
    """
    return _path(num_layers, cost, full=set(range(num_layers)))


def restore_path(num_layers: int, cost: Cost) -> list[str]:
    """Patterns from the fewest full layers to all, each one layer fuller: the one of least cost."""
    return _path(num_layers, cost, full={0, num_layers - 1})


def path_steps(num_layers: int) -> int:
    """How many patterns a path looks at."""
    inner = max(0, num_layers - 2)
    return 1 + inner * (inner + 1) // 2


def _path(num_layers: int, cost: Cost, full: set[int]) -> list[str]:
    """Change one inner layer after another from what it is in ``full`` to the other kind."""

    def changed(*layers: int) -> str:
        return from_full_layers(sorted(full ^ set(layers)), num_layers).pattern

    path, left = [changed()], list(range(1, num_layers - 1))
    cost(path[0])
    while left:
        layer = min(left, key=lambda layer: cost(changed(layer)))
        left.remove(layer)
        full ^= {layer}
        path.append(changed())
    return path
