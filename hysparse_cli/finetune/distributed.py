"""Joins the processes of a run for torch's collectives; one process is a world of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hysparse_cli.errors import OutOfResources
from hysparse_cli.model.loading import resolve_device
from hysparse_cli.processes import is_launched, rank, world_size

T = TypeVar("T")

_AXES = ("data_parallel", "context_parallel")  # divide a step's rows, and a row's tokens
_LOST = (
    "another process of this run ended without a word, perhaps killed for want of host memory; "
    "where state was saved, --resume auto goes on from it"
)


@dataclass(frozen=True)
class World:
    """``device`` is this process's own; ``mesh`` has one dimension, over all processes.

    ``context_parallel``: the processes that divide their rows' tokens with this one, neighbours in
    rank; or None.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    context_parallel: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def gathered(self, values: Tensor) -> Tensor:
        """(n,) of this process -> (processes, n), the same in all, in the order of the ranks."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(found, values)
        return torch.stack(found)

    def from_first(self, value: T) -> T:
        """What the first process gives; the others wait for it, and give what they like."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def from_each(self, value: T) -> list[T]:
        """What every process gives, in the order of the ranks."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]


@contextmanager
def joined(device: str, sequence_parallel_size: int = 1) -> Iterator[World]:
    """The world of the processes that a launcher started with this one, or this one alone.

    Args:
        device: "auto", "cpu" or "cuda"; of several CUDA devices each process has its own.
        sequence_parallel_size: how many processes divide each row's tokens; their number is a
            multiple of it.
    Raises: OutOfResources where there are fewer devices than processes, or another process of the
        world ended without a word.
    """
    target = resolve_device(device)
    if target.type == "cuda":
        target = torch.device("cuda", _own_device())
        torch.cuda.set_device(target)
    backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
    if is_launched():
        dist.init_process_group(backend)
    else:  # neither a port nor a file
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    failed = True
    try:
        mesh = init_device_mesh(target.type, (world_size(),))
        context_parallel = None
        if sequence_parallel_size > 1:
            shape = (world_size() // sequence_parallel_size, sequence_parallel_size)
            axes = init_device_mesh(target.type, shape, mesh_dim_names=_AXES)
            context_parallel = axes.get_group(_AXES[1])
        yield World(rank(), world_size(), target, mesh, context_parallel)
        failed = False
    except RuntimeError as error:
        if world_size() > 1 and _lost_another(error):
            raise OutOfResources(_LOST) from error
        raise
    finally:
        if not failed or world_size() == 1:  # else others may wait for this one: don't wait too
            dist.destroy_process_group()


def _own_device() -> int:
    local, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= devices:
        raise OutOfResources(
            f"{local + 1} processes or more were started here, but torch finds {devices} CUDA "
            "devices: start one process for each, or use --device cpu"
        )
    return local


def _lost_another(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)
