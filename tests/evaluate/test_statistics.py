"""Differences between models on the same pieces, against a bootstrap over pieces."""

import math
import random
from statistics import NormalDist, mean, stdev

import pytest

from hysparse_cli.evaluate.statistics import (
    Difference,
    Sample,
    difference,
    mean_difference,
    student_975,
)


def test_the_interval_is_that_of_a_bootstrap_over_pieces() -> None:
    rng = random.Random(0)
    counts = [rng.randint(5, 40) for _ in range(200)]
    hard = [rng.gauss(3, 1) for _ in counts]  # what both find hard: pairing takes it out
    one = Sample([n * h for n, h in zip(counts, hard, strict=True)], counts)
    other = Sample(
        [n * (h + rng.gauss(0.1, 0.2)) for n, h in zip(counts, hard, strict=True)], counts
    )
    found = difference(other, one)
    drawn = []
    for _ in range(2000):
        picked = rng.choices(range(len(counts)), k=len(counts))
        total = sum(counts[i] for i in picked)
        drawn.append(sum(other.sums[i] - one.sums[i] for i in picked) / total)
    assert found.value == pytest.approx(mean(drawn), abs=0.002)
    assert found.margin == pytest.approx(NormalDist().inv_cdf(0.975) * stdev(drawn), rel=0.08)
    assert found.margin is not None and found.margin < 0.3 * stdev(hard)


def test_equal_counts_give_the_textbook_interval_of_paired_means() -> None:
    found = difference(Sample([1, 2, 4, 8], [1] * 4), Sample([0, 2, 5, 4], [1] * 4))
    gaps = [1, 0, -1, 4]
    assert found.value == 1
    t = 3.182  # Student's, for 3 degrees of freedom
    assert found.margin == pytest.approx(t * stdev(gaps) / math.sqrt(len(gaps)), rel=0.01)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (10_000, 1.960)]
)
def test_students_quantile_is_that_of_the_tables(degrees: int, quantile: float) -> None:
    assert student_975(degrees) == pytest.approx(quantile, abs=5e-4)


def test_there_is_no_interval_without_pairs_or_from_few_pieces() -> None:
    few = [2, 2, 2, 0, 0]  # two of the five count nothing
    found = difference(Sample([3, 1, 5, 0, 0], few), Sample([1, 1, 1, 0, 0], few))
    assert found == Difference(1, None)
    assert difference(Sample([3, 1] * 3, [2, 2] * 3), Sample([1, 1] * 3, [2, 4] * 3)).margin is None


def test_a_mean_of_differences_of_their_own_is_surer_than_each() -> None:
    found = mean_difference([Difference(1, 3), Difference(2, 4)])
    assert found == Difference(1.5, 2.5)
    assert mean_difference([Difference(1, 3), Difference(2, None)]) == Difference(1.5, None)
    assert mean_difference([]) is None


def test_what_is_no_number_is_null() -> None:
    empty = Sample([], [])
    assert math.isnan(empty.mean)
    assert difference(empty, empty).as_json() == {"value": None, "low": None, "high": None}
    assert Difference(1, 0.5).as_json() == {"value": 1, "low": 0.5, "high": 1.5}
