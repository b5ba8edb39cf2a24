"""What the device reaches at its best: a large copy and a large matrix product, timed."""

from typing import Any

import torch

from hysparse_cli.bench.kernels.clock import Run, latency_of

COPY_BYTES = {"cuda": 2**31, "cpu": 2**24}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
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

    def per_second(run: Run, amount: float) -> float:
        run()
        return 1e3 * amount / latency_of(run, device, measure_ms).median

    return {
        "bytes_per_second": per_second(lambda: target.copy_(source), 2 * source.nbytes),
        "flops_per_second": per_second(lambda: a @ b, 2 * size**3),
    }
