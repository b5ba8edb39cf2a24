"""The one place that takes the time."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

R = TypeVar("R")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each repeat of one measurement."""

    samples_ms: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples_ms)

    def __str__(self) -> str:
        half_range = (max(self.samples_ms) - min(self.samples_ms)) / 2
        digits = max(0, 2 - int(math.log10(max(self.median, 1e-9))))
        return f"{self.median:,.{digits}f} ±{half_range / self.median:.0%}"

    def as_json(self, metric: str) -> dict[str, float | list[float]]:
        """Named as in vLLM's benches, such as ``median_ttft_ms``."""
        return {
            f"median_{metric}_ms": self.median,
            f"mean_{metric}_ms": statistics.fmean(self.samples_ms),
            f"std_{metric}_ms": statistics.pstdev(self.samples_ms),
            f"min_{metric}_ms": min(self.samples_ms),
            f"max_{metric}_ms": max(self.samples_ms),
            f"{metric}s_ms": self.samples_ms,
        }


def timed(work: Callable[[], R], device: torch.device) -> tuple[R, float]:
    """What ``work`` returns, and the milliseconds until the device had finished it."""
    _wait_for(device)
    begin = time.perf_counter()
    result = work()
    _wait_for(device)
    return result, 1e3 * (time.perf_counter() - begin)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
