"""Times a large copy and a large matrix product: the most that the device reaches."""

from collections.abc import Callable
from typing import Any

import torch

from hysparse_cli.bench.timing import Timing, timed

COPY_BYTES = {"cuda": 2**31, "cpu": 2**24}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
CPU_REPEATS = 3
MEASURE_MS = 100


def measured_ceilings(
    dtype: torch.dtype, device: torch.device, seed: int, measure_ms: int = MEASURE_MS
) -> dict[str, float]:
    """``bytes_per_second``, read and written, and ``flops_per_second`` in ``dtype``."""
    size, chance = MATMUL_SIZE[device.type], torch.Generator(device).manual_seed(seed)
    like: dict[str, Any] = {"device": device, "generator": chance}
    source = torch.randint(256, (COPY_BYTES[device.type],), dtype=torch.uint8, **like)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, dtype=dtype, **like) for _ in range(2))

    def per_second(run: Callable[[], Any], amount: float) -> float:
        return 1e3 * amount / _timing(run, device, measure_ms).median

    return {
        "bytes_per_second": per_second(lambda: target.copy_(source), 2 * source.nbytes),
        "flops_per_second": per_second(lambda: a @ b, 2 * size**3),
    }


def _timing(run: Callable[[], Any], device: torch.device, measure_ms: int) -> Timing:
    if device.type == "cuda":
        from triton.testing import do_bench

        return Timing(do_bench(run, rep=measure_ms, return_mode="all"))
    run()
    return Timing([timed(run, device)[1] for _ in range(CPU_REPEATS)])
