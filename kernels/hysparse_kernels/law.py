"""The one law of exactness: a kernel errs at most twice as much as plain torch in its dtype.

Truth is the reference in float64. For gradients the factor is three. There is a floor: one
rounding of the largest true value in the kernel's dtype, or eight in float32, which is what a
result of few numbers may err by chance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR, FACTOR_OF_GRADIENTS = 2.0, 3.0
TINY = 2e-6  # of sums of float32 numbers of order one that should come to exactly 0


@dataclass(frozen=True)
class Error:
    """What the kernel and plain torch err, by one measure, and what the kernel is allowed."""

    what: str
    kernel: float
    plain: float
    allowed: float

    @property
    def lawful(self) -> bool:
        return self.kernel <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return f"{self.what} {self.kernel:.1e} / {self.plain:.1e}"


def judge(
    what: str, kernel: Tensor, plain: Tensor, truth: Tensor, *, gradient: bool = False
) -> tuple[Error, Error]:
    """The largest error and the root mean square of all.

    Args: kernel, plain, truth: of one shape, not empty.
    """
    factor = FACTOR_OF_GRADIENTS if gradient else FACTOR
    eps = max(torch.finfo(kernel.dtype).eps, 8 * torch.finfo(torch.float32).eps)
    floor = eps * float(truth.abs().max()) + TINY
    ours, theirs = ((x.double() - truth).abs() for x in (kernel, plain))
    largest, largest_plain = float(ours.max()), float(theirs.max())
    mean, mean_plain = (float(x.square().mean().sqrt()) for x in (ours, theirs))
    return (
        Error(what, largest, largest_plain, factor * largest_plain + floor),
        Error(f"{what}, rms", mean, mean_plain, factor * mean_plain + floor / 4),
    )
