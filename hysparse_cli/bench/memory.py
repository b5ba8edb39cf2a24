"""Measures memory: what weights and cache take, and how many sequences fit beside the weights."""

from typing import Any

import psutil
import torch

from hysparse_cli.bench.decode import Decoding, static_cache, static_kv_cache
from hysparse_cli.devices import free_memory, is_out_of_memory
from hysparse_cli.model.kv_cache import held_kv_bytes

MOST_ON_CPU = 1 << 30  # bytes: a plan must not fill a laptop's memory
RESERVE = 1 << 30  # bytes that kernels and libraries take beside tensors
TRIES = 50  # at most, each with 2% less


def measure_memory(
    config: Any, weight_bytes: int, context: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Bytes of weights and of one sequence's keys and values, and the largest batch by arithmetic.

    kv_bytes: of a static cache that is really allocated; None where that would take more memory
        than there is, or on a CPU more than ``MOST_ON_CPU``.
    """
    free, total = memory_of(device)
    counted = static_kv_cache(config).total_bytes(context, dtype.itemsize)
    reserve = RESERVE if device.type == "cuda" else 0
    held = None
    if counted <= (free if device.type == "cuda" else min(free, MOST_ON_CPU)):
        held = held_kv_bytes(static_cache(config, context, 1, dtype, device))
    return {
        "kv_bytes": held,
        "arithmetic_kv_bytes": counted,
        "weight_bytes": weight_bytes,
        "free_bytes": free,
        "total_bytes": total,
        "largest_batch": max(0, (free - reserve - weight_bytes) // counted),
        "largest_batch_is": "arithmetic",
    }


@torch.inference_mode()
def confirm(model: Any, context: int, largest: int, seed: int) -> int:
    """The largest batch, ``largest`` or a little less, that takes a step of decoding."""
    for number in range(largest, 0, -max(1, largest // TRIES)):
        try:
            Decoding(model, context, number, seed).step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return number
        free_memory(model.device)
    return 0


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes free and in all, on a GPU or of this machine."""
    if device.type == "cuda":
        free_memory(device)
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    machine = psutil.virtual_memory()
    return machine.available, machine.total
