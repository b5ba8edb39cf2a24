"""The time of one call on a GPU, its L2 cache flushed before, or of many calls in a CUDA graph."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hysparse_cli.bench.timing import timed

Run = Callable[[], Any]

CPU_REPEATS = 3
FEWEST_REPEATS = 5
GRAPH_REPLAYS = 20
# Writing so much clears the L2 cache, and takes so long that the host is ahead: the time it takes
# to launch does not count.
ELSEWHERE_BYTES = 2**32


@dataclass(frozen=True)
class Latency:
    """Milliseconds of each measured call."""

    samples_ms: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples_ms)

    def percentile(self, rank: int) -> float:
        """The nearest sample, ``rank`` from 0 to 100."""
        ordered = sorted(self.samples_ms)
        return ordered[round(rank / 100 * (len(ordered) - 1))]

    def as_json(self) -> dict[str, float | int]:
        return {
            "median_latency_ms": self.median,
            "p10_latency_ms": self.percentile(10),
            "p90_latency_ms": self.percentile(90),
            "samples": len(self.samples_ms),
        }


def latency_of(run: Run, device: torch.device, measure_ms: int) -> Latency:
    """Time ``run`` for about ``measure_ms``; on a GPU each call finds the L2 cache cold."""
    if device.type == "cpu":
        return Latency([timed(run, device)[1] for _ in range(CPU_REPEATS)])
    run()
    elsewhere = torch.empty(ELSEWHERE_BYTES, dtype=torch.uint8, device=device)
    _, first = timed(run, device)
    events = []
    for _ in range(max(FEWEST_REPEATS, int(measure_ms / first))):
        elsewhere.zero_()
        events.append(_events_around(run))
    torch.cuda.synchronize(device)
    return Latency([begin.elapsed_time(end) for begin, end in events])


def latency_in_graph(runs: Sequence[Run], device: torch.device) -> Latency:
    """Time ``runs`` one after the other in a CUDA graph, and divide by their number.

    They should read different data, more together than the L2 cache holds.
    """
    if device.type == "cpu":
        return Latency([timed(run, device)[1] for run in runs])
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for run in runs[:2]:
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    events = [_events_around(graph.replay) for _ in range(GRAPH_REPLAYS)]
    torch.cuda.synchronize(device)
    return Latency([begin.elapsed_time(end) / len(runs) for begin, end in events])


def _events_around(work: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    return begin, end
