"""Readies the case of a row: an op to be timed and checked, what it costs, and its peers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.check import check_backward, check_forward, leaves_of, output_of
from benchmarks.clock import Run
from benchmarks.operations import Operation, Tensors
from benchmarks.options import Options
from hysparse_cli.bench.work import ATTENTION_BACKWARD, Work
from hysparse_kernels import KeyRange, causal
from hysparse_kernels.tolerance import Error


@dataclass(frozen=True)
class Shape:
    """``queries`` of each sequence over ``keys``: all of them in prefill, one in decode."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return f"{self.batch} x {self.keys:,}, {self.heads}/{self.kv_heads} x {self.head_dim}"


@dataclass(frozen=True)
class Peer:
    """Someone else's op for the same, timed once a run for the same ``key``.

    start: readies the inputs and gives what is timed; several where a graph holds them all.
    """

    name: str
    key: tuple[Any, ...]
    start: Callable[[], list[Run]]


@dataclass(frozen=True)
class Ready:
    """An op ready to be timed; ``runs`` are alike, several only where a graph holds them all.

    work: of one run, at the least.
    """

    operation: Operation
    runs: list[Run]
    check: Callable[[], list[Error]]
    work: Work
    peers: list[Peer] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One row of the table. bound: the ceiling it is held against, "copy" or "matmul"."""

    name: str
    shape: Shape
    bound: str
    start: Callable[[], Ready]
    in_graph: bool = False


class Inputs:
    """Makes inputs of one shape, standard normal, the same in every run."""

    def __init__(self, options: Options, shape: Shape, device: torch.device):
        self.options, self.shape, self.device = options, shape, device

    def chance(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(1000 * self.options.seed + seed)

    def normal(self, *sizes: int, seed: int) -> Tensor:
        dtype = getattr(torch, self.options.dtype)
        chance = self.chance(seed)
        return torch.randn(*sizes, generator=chance, device=self.device, dtype=dtype)

    def by_query(self, seed: int, width: int | None = None) -> Tensor:
        """(B, T, H, width), D wide by default."""
        shape = self.shape
        width = shape.head_dim if width is None else width
        return self.normal(shape.batch, shape.queries, shape.heads, width, seed=seed)

    def by_key(self, seed: int, keys: int | None = None) -> Tensor:
        """(B, S, G, D); in decode (B, G, S, D) in memory, as caches are."""
        shape = self.shape
        keys = shape.keys if keys is None else keys
        if shape.queries == shape.keys:
            return self.normal(shape.batch, keys, shape.kv_heads, shape.head_dim, seed=seed)
        cache = self.normal(shape.batch, shape.kv_heads, keys, shape.head_dim, seed=seed)
        return cache.transpose(1, 2)

    def sinks(self, *branches: int) -> Tensor:
        """(H, *branches) float32."""
        sizes = (self.shape.heads, *branches)
        return torch.randn(*sizes, generator=self.chance(99), device=self.device)

    def seen(self) -> KeyRange:
        return causal(self.shape.queries, self.shape.keys, self.device)


def forward_run(function: Callable[[Tensors], Any], inputs: Tensors) -> Run:
    """``function`` without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return function(inputs)

    return run


def forward_of(operation: Operation) -> Run:
    """``operation`` on its inputs, without gradients."""
    return forward_run(lambda x: operation.call(x, operation.seen), operation.inputs)


def backward_run(function: Callable[[Tensors], Any], inputs: Tensors, grad_out: Tensor) -> Run:
    """Only the backward of ``function``, whose forward is run here."""
    leaves = leaves_of(inputs)
    wanted = [x for x in leaves.values() if x.requires_grad]
    out = output_of(function(leaves))
    return lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True)


def ready(operation: Operation, grad_out: Tensor | None, pairs: int, peers: list[Peer]) -> Ready:
    """The forward of ``operation``, or where ``grad_out`` is given its backward.

    pairs: how many (query, key) pairs it computes, all heads together.
    """
    inputs, seen = operation.inputs, operation.seen
    q = inputs["q"]
    flops = 4.0 * q.shape[-1] * pairs
    moved = q.nbytes + sum(x.nbytes for x in inputs.values())
    if grad_out is None:
        run, work = forward_of(operation), Work(flops, moved)
        return Ready(operation, [run], lambda: check_forward(operation), work, peers)
    run = backward_run(lambda x: operation.call(x, seen), inputs, grad_out)
    moved += grad_out.nbytes + sum(x.nbytes for x in inputs.values() if x.is_floating_point())
    work = Work(ATTENTION_BACKWARD * flops, moved)
    return Ready(operation, [run], lambda: check_backward(operation, grad_out), work, peers)


def peer_of(
    name: str,
    key: tuple[Any, ...],
    function: Callable[[Tensors], Any],
    inputs: Tensors,
    grad_out: Tensor | None,
) -> Peer:
    """``function`` as a peer of the same direction as in ``ready``."""

    def start() -> list[Run]:
        if grad_out is None:
            return [forward_run(function, inputs)]
        return [backward_run(function, inputs, grad_out)]

    return Peer(name, (name, grad_out is not None, *key), start)
