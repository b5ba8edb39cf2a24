"""Dynamic programming against brute force, and what a pattern is worth."""

import itertools
import random

import pytest

from hysparse_cli.placement.dp import best_pattern, weight_of


def all_patterns(num_layers: int, num_full: int) -> list[str]:
    letters = itertools.product("FS", repeat=num_layers)
    return ["".join(p) for p in letters if p[0] == p[-1] == "F" and p.count("F") == num_full]


@pytest.mark.parametrize("num_layers", range(1, 10))
def test_the_best_pattern_is_the_one_that_brute_force_finds(num_layers: int) -> None:
    rng = random.Random(num_layers)
    for _ in range(20):
        weights = [[rng.uniform(-1, 1) for _ in range(num_layers)] for _ in range(num_layers)]
        for num_full in range(min(2, num_layers), num_layers + 1):
            found = best_pattern(weights, num_full)
            patterns = all_patterns(num_layers, num_full)
            assert found == max(patterns, key=lambda p: weight_of(weights, p))


def test_ties_go_to_the_earlier_layers() -> None:
    assert best_pattern([[1.0] * 6 for _ in range(6)], 4) == "FFFSSF"


def test_a_pattern_is_worth_what_its_servers_give() -> None:
    weights = [[1.0, 0.5, 0.25, 0.0], [0.0, 1.0, 0.75, 0.0], [0.0] * 4, [0.0, 0.0, 0.0, 1.0]]
    assert weight_of(weights, "FSSF") == 1.0 + 0.5 + 0.25 + 1.0
    assert weight_of(weights, "FFSF") == 1.0 + 1.0 + 0.75 + 1.0
