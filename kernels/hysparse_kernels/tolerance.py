"""Judges a kernel's error: at most twice that of plain torch in its dtype.

Truth is the reference in float64. For gradients the factor is three. Two measures are held to it,
the largest error and the root mean square. Results of few numbers may err by chance, so each may
err by a floor, too: half a unit in the last place of the kernel's dtype, or eight roundings in
float32, of the largest true value; half of that, of the root mean square; and ``TINY``.
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
) -> list[Error]:
    """The largest error and the root mean square of all.

    Args: kernel, plain, truth: of one shape, not empty.
    """
    factor = FACTOR_OF_GRADIENTS if gradient else FACTOR
    eps = max(torch.finfo(kernel.dtype).eps / 2, 8 * torch.finfo(torch.float32).eps)
    ours, theirs = ((x.double() - truth).abs() for x in (kernel, plain))
    errors = []
    for name, measure, share in ((what, torch.amax, 1.0), (f"{what}, rms", _rms, 0.5)):
        erring, size = (float(measure(x)) for x in (ours, truth.abs()))
        plainly = float(measure(theirs))
        errors.append(Error(name, erring, plainly, factor * plainly + share * eps * size + TINY))
    return errors


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
