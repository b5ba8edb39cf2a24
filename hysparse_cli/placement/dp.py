"""Finds the best placement of a number of full layers, by dynamic programming (after Kascade).

``weights[a][b]`` is what layer b is worth when layer a serves it, ``weights[b][b]`` when it is
full. The sum over all layers is the greatest that any pattern of so many full layers has.
"""

from collections.abc import Sequence
from itertools import accumulate

from hysparse_cli.pattern import Pattern, from_full_layers

Weights = Sequence[Sequence[float]]


def best_pattern(weights: Weights, num_full: int) -> str:
    """The pattern with ``num_full`` full layers, the first and the last among them, of most weight.

        V[k][i] = max over l < i of V[k-1][l] + sum over j = l..i-1 of weights[l][j]

    O(num_full * L^2) through prefix sums; ties go to the earlier layer.

    Args:
        weights: L x L; what is below the diagonal is not read.
        num_full: from 2 (1 for a single layer) to L.
    """
    last = len(weights) - 1
    assert min(2, last + 1) <= num_full <= last + 1, "so many full layers can be placed"
    # served[a][i]: what layers a to i - 1 are worth as one hybrid block
    served = [[0.0] * a + [0.0, *accumulate(weights[a][a:])] for a in range(last + 1)]
    none = float("-inf")
    best = [0.0] + [none] * last  # layer 0 is the first full one
    came_from: list[list[int]] = []
    for _ in range(num_full - 1):
        choices = [
            max((best[a] + served[a][i], -a) for a in range(i)) if i else (none, 0)
            for i in range(last + 1)
        ]
        best = [value for value, _ in choices]
        came_from.append([-minus for _, minus in choices])
    full = [last]
    for table in reversed(came_from):
        full.append(table[full[-1]])
    return from_full_layers(full, last + 1).pattern


def weight_of(weights: Weights, pattern: str) -> float:
    """What ``pattern`` is worth."""
    layers = Pattern(pattern)
    return sum(weights[layers.server_of(layer)][layer] for layer in range(len(pattern)))
