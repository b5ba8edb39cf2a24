"""Describes the machine under a measurement, and recognises when its memory is full."""

import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hysparse_cli.errors import OutOfResources


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether ``error`` says that memory ran out, on the GPU or on the CPU."""
    said = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in said
        for words in ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")
    )


@contextmanager
def out_of_memory_is(line: str) -> Iterator[None]:
    """Let running out of memory inside the block be an OutOfResources that says ``line``.

    Raises: OutOfResources.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfResources(line) from error


def free_memory(device: torch.device) -> None:
    """Give the memory that no tensor holds any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(device: torch.device) -> dict[str, str | int]:
    """What a measurement must be read with: the device and the versions under it."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    return platform.processor() or platform.machine()
