"""Times calls: as a user waits for them, as spans along a device's queue, and their statistics."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

R = TypeVar("R")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each repeat of one measurement."""

    samples_ms: list[float]

    @property
    def median(self) -> float:
        return self.percentile(50)

    def percentile(self, rank: int) -> float:
        """``rank`` from 0 to 100; between two samples in proportion."""
        return float(np.percentile(self.samples_ms, rank))

    def __str__(self) -> str:
        if len(self.samples_ms) == 1:
            return milliseconds(self.median)
        half_range = (max(self.samples_ms) - min(self.samples_ms)) / 2
        return f"{milliseconds(self.median)} ±{half_range / self.median:.0%}"

    def as_json(self, metric: str) -> dict[str, float | list[float]]:
        """Named as in vLLM's benches, such as ``median_ttft_ms``."""
        return {
            f"median_{metric}_ms": self.median,
            f"mean_{metric}_ms": float(np.mean(self.samples_ms)),
            f"std_{metric}_ms": float(np.std(self.samples_ms)),
            f"p50_{metric}_ms": self.percentile(50),
            f"p90_{metric}_ms": self.percentile(90),
            f"p99_{metric}_ms": self.percentile(99),
            f"min_{metric}_ms": min(self.samples_ms),
            f"max_{metric}_ms": max(self.samples_ms),
            f"{metric}s_ms": self.samples_ms,
        }


def milliseconds(value: float) -> str:
    """Three digits, or all before the point."""
    digits = max(0, 2 - math.floor(math.log10(max(value, 1e-9))))
    return f"{value:,.{digits}f}"


def timed(work: Callable[[], R], device: torch.device) -> tuple[R, float]:
    """What ``work`` returns, and the milliseconds until the device had finished it."""
    _wait_for(device)
    begin = time.perf_counter()
    result = work()
    _wait_for(device)
    return result, 1e3 * (time.perf_counter() - begin)


class Marks:
    """Begins and ends noted along a device's queue, in turns, without waiting for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._events: list[torch.cuda.Event] = []
        self._seconds: list[float] = []

    def mark(self) -> None:
        if self.device.type != "cuda":
            self._seconds.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def spans_ms(self) -> list[float]:
        """Milliseconds of each begin to its end, once the device has come so far."""
        _wait_for(self.device)
        events, seconds = iter(self._events), iter(self._seconds)
        by_events = [begin.elapsed_time(end) for begin, end in zip(events, events, strict=True)]
        return by_events + [1e3 * (e - b) for b, e in zip(seconds, seconds, strict=True)]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
