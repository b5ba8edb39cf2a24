"""The sweep: ceilings first, then every case: timed, checked, and its peers beside it."""

import gc
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hysparse_cli.bench.ceilings import measured_ceilings
from hysparse_cli.bench.kernels.clock import Latency, Run, latency_in_graph, latency_of
from hysparse_cli.bench.kernels.decode import decode_cases
from hysparse_cli.bench.kernels.lists import read_lists
from hysparse_cli.bench.kernels.prefill import prefill_cases
from hysparse_cli.bench.kernels.result import Ceiling, KernelBench, PeerTime, Row
from hysparse_cli.bench.kernels.work import Case, Peer, Shape, Work
from hysparse_cli.devices import describe, is_out_of_memory
from hysparse_cli.errors import OutOfResources
from hysparse_cli.recipe import KernelBenchOptions
from hysparse_kernels.backends import Call, choose

# What kernels and peers raise: a failure is a row, not the end.
FAILURES: tuple[type[Exception], ...] = (
    *(RuntimeError, MemoryError, ImportError),
    *(ValueError, TypeError, AttributeError, AssertionError),
)
if find_spec("triton"):
    from triton.errors import TritonError

    FAILURES += (TritonError,)

Progress = Callable[[str, int, int], None]
PeerTimes = dict[tuple[Any, ...], PeerTime]

REASON_LENGTH = 120


def bench_kernels(
    options: KernelBenchOptions,
    on_progress: Progress = lambda what, done, total: None,
    on_row: Callable[[KernelBench], None] = lambda so_far: None,
) -> KernelBench:
    """Measure every op of ``options.ops`` at every context, on random inputs.

    ``on_row`` is told what there is after each row. A row says so where memory runs out, where a
    kernel raises (which fails it), and where a peer is not there or raises.

    Raises: OutOfResources where there is no GPU and the CPU was not asked for; UnreadableInput or
        InvalidRecipe where ``options.lists`` don't fit.
    """
    device = _device(options)
    cases = cases_of(options, device)
    if options.lists is not None:  # before the long part
        read_lists(Path(options.lists), 1, 1, options.top_k_blocks, options.block_size)
    on_progress("ceilings", 0, len(cases))
    ceilings = {ceiling.name: ceiling for ceiling in _ceilings(options, device)}
    rows: list[Row] = []
    found = KernelBench(options, describe(device), list(ceilings.values()), rows)
    known: PeerTimes = {}
    for done, case in enumerate(cases):
        on_progress(f"{case.name}, {case.shape}", done, len(cases))
        rows.append(_measure(case, options, device, ceilings[case.bound], known))
        on_row(found)
        _free_memory(device)
    return found


def cases_of(options: KernelBenchOptions, device: torch.device) -> list[Case]:
    """All cases, by op, then context, then heads, each in the order of the options."""
    found: list[Case] = []
    for op in options.ops:
        if op == "decode":
            sizes = [(batch, 1, options.decode_context) for batch in options.decode_batch]
            shapes = [Shape(*size, *options.head_counts[0], options.head_dim) for size in sizes]
            found += [case for shape in shapes for case in decode_cases(options, shape, device)]
            continue
        for context in options.context:
            for heads in options.head_counts:
                shape = Shape(1, context, context, *heads, options.head_dim)
                found += prefill_cases(op, options, shape, device)
    return found


def _measure(
    case: Case,
    options: KernelBenchOptions,
    device: torch.device,
    ceiling: Ceiling,
    known: PeerTimes,
) -> Row:
    try:
        work = case.start()
        backend = _backend_of(work)
        latency = _latency(work.runs, case, options, device)
        errors = work.check()
    except FAILURES as error:
        return Row(case.name, case.shape, error=_reason(error), failed=not _is_memory(error))
    times = {peer.name: _peer_time(peer, case, options, device, known) for peer in work.peers}
    return Row(
        case.name,
        case.shape,
        backend=backend,
        latency=latency,
        errors=errors,
        flops=work.flops,
        moved=work.moved,
        ceiling=ceiling,
        peers=times,
    )


def _peer_time(
    peer: Peer, case: Case, options: KernelBenchOptions, device: torch.device, known: PeerTimes
) -> PeerTime:
    if peer.key not in known:
        try:
            known[peer.key] = PeerTime(_latency(peer.start(), case, options, device))
        except FAILURES as error:
            known[peer.key] = PeerTime(None, _reason(error))
    return known[peer.key]


def _latency(
    runs: Sequence[Run], case: Case, options: KernelBenchOptions, device: torch.device
) -> Latency:
    if case.in_graph:
        return latency_in_graph(runs, device)
    (run,) = runs
    return latency_of(run, device, options.measure_ms)


def _backend_of(work: Work) -> str:
    x = work.operation.inputs
    return str(choose(Call(work.operation.name, x["q"], x["k"], x["v"], work.operation.block_size)))


def _ceilings(options: KernelBenchOptions, device: torch.device) -> list[Ceiling]:
    """What copying and multiplying large tensors reaches, per second."""
    dtype = getattr(torch, options.dtype)
    found = measured_ceilings(dtype, device, options.seed, options.measure_ms)
    return [
        Ceiling("copy", "TB/s", found["bytes_per_second"]),
        Ceiling("matmul", "TFLOP/s", found["flops_per_second"]),
    ]


def _device(options: KernelBenchOptions) -> torch.device:
    if options.device != "cpu" and not torch.cuda.is_available():
        raise OutOfResources(
            "bench kernels measures a GPU, and torch finds none here; --device cpu tries the "
            "reference out, at a short --context"
        )
    return torch.device("cpu" if options.device == "cpu" else "cuda")


def _reason(error: Exception) -> str:
    """The first sentence of what was said."""
    said = " ".join(str(error).split()).split(". ")[0].rstrip(".")[:REASON_LENGTH]
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    if _is_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _is_memory(error: Exception) -> bool:
    return isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
