"""What was measured piece by piece, and how far two models differ on the same pieces."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

FEWEST_PIECES = 4  # fewer say too little about how much they vary


@dataclass(frozen=True)
class Sample:
    """A measured mean, kept by piece (a window, a context): the sum in each, and of how many."""

    sums: list[float]
    counts: list[int]

    @property
    def total(self) -> float:
        return math.fsum(self.sums)

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """NaN where nothing was counted."""
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True)
class Difference:
    """``value`` ± ``margin``, its 95% confidence interval; None where too little is known."""

    value: float
    margin: float | None

    def as_json(self) -> dict[str, float | None]:
        margin = math.nan if self.margin is None else self.margin
        return {
            "value": finite(self.value),
            "low": finite(self.value - margin),
            "high": finite(self.value + margin),
        }


def difference(sample: Sample, reference: Sample) -> Difference:
    """How far the mean of ``sample`` is above that of ``reference``, both of the same pieces.

    With d_i the difference of the sums in piece i, of n_i, the value is D = sum d_i / sum n_i and
    its standard error sqrt(m / (m - 1) sum (d_i - D n_i)^2) / sum n_i over the m pieces that count
    anything: the ratio estimate with pieces as clusters (Cochran, Sampling Techniques, 6.3), and
    Student's t with m - 1 degrees of freedom. It speaks for other pieces of the same kind of text.
    """
    value = sample.mean - reference.mean
    if sample.counts != reference.counts:
        return Difference(value, None)
    pieces = [
        (a - b, n)
        for a, b, n in zip(sample.sums, reference.sums, sample.counts, strict=True)
        if n > 0
    ]
    if len(pieces) < FEWEST_PIECES:
        return Difference(value, None)
    spread = math.fsum((d - value * n) ** 2 for d, n in pieces)
    error = math.sqrt(spread * len(pieces) / (len(pieces) - 1)) / sample.count
    return Difference(value, student_975(len(pieces) - 1) * error)


def student_975(degrees: int) -> float:
    """The 97.5% quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def mean_difference(found: Sequence[Difference]) -> Difference | None:
    """The mean of differences that were measured on pieces of their own; None where none was."""
    if not found:
        return None
    margins = [difference.margin for difference in found]
    known = [margin for margin in margins if margin is not None]
    whole = math.hypot(*known) / len(found) if len(known) == len(found) else None
    return Difference(fmean(difference.value for difference in found), whole)


def finite(value: float) -> float | None:
    """``value``, or None where JSON can't hold it."""
    return value if math.isfinite(value) else None
