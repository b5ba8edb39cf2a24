"""Times one call at a time on a GPU whose L2 cache is cold, or many calls in a CUDA graph."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch

from hysparse_cli.bench.timing import Marks, Timing, timed

Run = Callable[[], Any]

CPU_REPEATS = 3
FEWEST_REPEATS = 5
# Writing so much clears the L2 cache, and takes so long that the host is ahead: the time it takes
# to launch does not count. Triton's do_bench writes 256 MB, and an op takes longer to launch.
ELSEWHERE_BYTES = 2**32


def time_cold(run: Run, device: torch.device, measure_ms: int) -> Timing:
    """Time ``run`` for about ``measure_ms``; on a GPU each call finds the L2 cache cold."""
    if device.type == "cpu":
        return Timing([timed(run, device)[1] for _ in range(CPU_REPEATS)])
    run()
    elsewhere = torch.empty(ELSEWHERE_BYTES, dtype=torch.uint8, device=device)
    _, first = timed(run, device)
    marks = Marks(device)
    for _ in range(max(FEWEST_REPEATS, int(measure_ms / first))):
        elsewhere.zero_()
        marks.mark()
        run()
        marks.mark()
    return Timing(marks.spans_ms())


def time_in_graph(runs: Sequence[Run], device: torch.device, measure_ms: int) -> Timing:
    """Time ``runs`` one after the other in a CUDA graph of about ``measure_ms``, again and again.

    They should read different data, more together than the L2 cache holds. A sample is the mean of
    one replay.
    """
    if device.type == "cpu":
        return Timing([timed(run, device)[1] for run in runs])
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize(device)  # the graph is captured on a stream that waits for no other
    turns = cycle(runs)
    return Timing(do_bench_cudagraph(lambda: next(turns)(), rep=measure_ms, return_mode="all"))
