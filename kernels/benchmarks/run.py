"""Runs the sweep: ceilings first, then every case: timed, checked, and its peers beside it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cases import Case, Peer, Ready, Shape
from benchmarks.clock import Run, time_cold, time_in_graph
from benchmarks.decode import decode_cases
from benchmarks.options import Options
from benchmarks.prefill import prefill_cases
from benchmarks.result import Benchmarks, Ceiling, PeerTime, Result
from hysparse_cli.bench.ceilings import measured_ceilings
from hysparse_cli.bench.failures import FAILURES, OUT_OF_MEMORY, reason_of
from hysparse_cli.bench.lists import read_lists
from hysparse_cli.bench.timing import Timing
from hysparse_cli.devices import describe, free_memory
from hysparse_cli.errors import OutOfResources
from hysparse_kernels.backends import Call, choose

Progress = Callable[[str, int, int], None]
PeerTimes = dict[tuple[Any, ...], PeerTime]


def bench_kernels(
    options: Options,
    on_progress: Progress = lambda what, done, total: None,
    on_row: Callable[[Benchmarks], None] = lambda so_far: None,
) -> Benchmarks:
    """Measure every op of ``options.ops`` at every context, on random inputs.

    ``on_row`` is told what there is after each row. A row says so where memory runs out, where a
    kernel raises (which fails it), and where a peer is not there or raises.

    Raises: OutOfResources where there is no GPU and the CPU was not asked for; UnreadableInput or
        InvalidRecipe where ``options.lists`` don't fit.
    """
    device = _device(options)
    cases = cases_of(options, device)
    if options.lists is not None:  # before the long part
        read_lists(options.lists, 1, 1, options.top_k_blocks, options.block_size)
    on_progress("ceilings", 0, len(cases))
    ceilings = {ceiling.name: ceiling for ceiling in _ceilings(options, device)}
    rows: list[Result] = []
    found = Benchmarks(options, describe(device), list(ceilings.values()), rows)
    known: PeerTimes = {}
    for done, case in enumerate(cases):
        on_progress(f"{case.name}, {case.shape}", done, len(cases))
        rows.append(_measure(case, options, device, ceilings[case.bound], known))
        on_row(found)
        free_memory(device)
    return found


def cases_of(options: Options, device: torch.device) -> list[Case]:
    """All cases, by op, then context, then heads, each in the order of the options."""
    found: list[Case] = []
    for op in options.ops:
        if op == "decode":
            sizes = [(batch, 1, options.decode_context) for batch in options.decode_batch]
            shapes = [Shape(*size, *options.heads[0], options.head_dim) for size in sizes]
            found += [case for shape in shapes for case in decode_cases(options, shape, device)]
            continue
        for context in options.context:
            for heads in options.heads:
                shape = Shape(1, context, context, *heads, options.head_dim)
                found += prefill_cases(op, options, shape, device)
    return found


def _measure(
    case: Case, options: Options, device: torch.device, ceiling: Ceiling, known: PeerTimes
) -> Result:
    try:
        ready = case.start()
        backend = _backend_of(ready)
        timing = _timing(ready.runs, case, options, device)
        errors = ready.check()
    except FAILURES as error:
        reason = reason_of(error)
        return Result(case.name, case.shape, error=reason, failed=reason != OUT_OF_MEMORY)
    peers = {peer.name: _peer_time(peer, case, options, device, known) for peer in ready.peers}
    return Result(case.name, case.shape, backend, timing, errors, ready.work, ceiling, peers)


def _peer_time(
    peer: Peer, case: Case, options: Options, device: torch.device, known: PeerTimes
) -> PeerTime:
    if peer.key not in known:
        try:
            known[peer.key] = _timing(peer.start(), case, options, device)
        except FAILURES as error:
            known[peer.key] = reason_of(error)
    return known[peer.key]


def _timing(runs: Sequence[Run], case: Case, options: Options, device: torch.device) -> Timing:
    if case.in_graph:
        return time_in_graph(runs, device, options.measure_ms)
    (run,) = runs
    return time_cold(run, device, options.measure_ms)


def _backend_of(ready: Ready) -> str:
    x, operation = ready.operation.inputs, ready.operation
    return str(choose(Call(operation.name, x["q"], x["k"], x["v"], operation.block_size)))


def _ceilings(options: Options, device: torch.device) -> list[Ceiling]:
    """What copying and multiplying large tensors reaches, per second."""
    dtype = getattr(torch, options.dtype)
    found = measured_ceilings(dtype, device, options.seed, options.measure_ms)
    return [
        Ceiling("copy", "TB/s", found["bytes_per_second"]),
        Ceiling("matmul", "TFLOP/s", found["flops_per_second"]),
    ]


def _device(options: Options) -> torch.device:
    if options.device != "cpu" and not torch.cuda.is_available():
        raise OutOfResources(
            "this measures a GPU, and torch finds none here; --device cpu tries the reference "
            "out, at a short --context"
        )
    return torch.device(options.device)
