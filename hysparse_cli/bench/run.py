"""Runs the sweep: every subject at every phase, context and batch, taking turns."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hysparse_cli.bench.environment import clocks, environment
from hysparse_cli.bench.processes import Worker, interruptible
from hysparse_cli.bench.result import RECIPE, RESULT, WRITTEN_AFTER, Bench
from hysparse_cli.bench.rows import Row, row_of
from hysparse_cli.bench.subjects import subjects_of
from hysparse_cli.bench.worker import Cell, Failed
from hysparse_cli.errors import OutOfResources
from hysparse_cli.files.journal import Journal, Line
from hysparse_cli.files.output import keeping, write_whole
from hysparse_cli.files.results import prepare_results
from hysparse_cli.model.loading import resolve_device
from hysparse_cli.recipe import BenchOptions, to_yaml

ROWS = "rows.jsonl"

Progress = Callable[[str, int, int], None]


class Finished:
    """What a sweep has measured so far, in ``ROWS`` of its output folder where it has one.

    found: what else was measured, such as the ceilings. Raises: what ``Journal`` does.
    """

    def __init__(self, folder: Path | None, stamp: dict[str, Any]):
        self.rows: list[Row] = []
        self.found: dict[str, Any] = {}
        self.journal = Journal(folder and folder / ROWS, "bench", self._take, stamp)

    def add(self, rows: list[Row]) -> None:
        """Keep all rows of a cell at once."""
        self.rows += rows
        self.journal.append({"rows": [asdict(row) for row in rows]})

    def find(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.journal.append({name: value})

    def _take(self, line: Line) -> None:
        self.rows += [Row(**row) for row in line.pop("rows", [])]
        self.found |= line


def bench(
    checkpoint: str | None,
    options: BenchOptions,
    on_progress: Progress = lambda what, done, total: None,
    output: Path | None = None,
) -> Bench:
    """Measure ``checkpoint``, or ``options.config`` with random weights, beside its peers.

    In each cell the subjects take turns, ``warmup`` times unmeasured and then ``repeat`` times, so
    that a machine that slows down slows them all. Where memory runs out or a process is lost, a
    row says so.

    Args:
        output: a folder for all results; the finished rows that it holds are not measured again.
    Raises: what ``subjects_of`` and ``Finished`` do; UnreadableInput or UnsupportedModel where a
        checkpoint can't be loaded; Interrupted where finished rows are kept in ``output``.
    """
    device = resolve_device(options.device)
    subjects = subjects_of(checkpoint, options, on_cuda=device.type == "cuda")
    machine = environment(device)
    stamp = {
        "options": options.model_dump(mode="json"),
        "subjects": [asdict(subject) for subject in subjects],
        **machine,
    }
    if output is not None:
        prepare_results(output, RESULT, "hysparse.bench/", WRITTEN_AFTER)
    finished = Finished(output, stamp)
    done = {row.cell for row in finished.rows}
    waiting = [
        cell for cell in cells_of(options) if (cell.phase, cell.context, cell.batch) not in done
    ]
    if waiting or "ceilings" not in finished.found:
        readings = [*finished.found.get("clocks", []), clocks(device)]
        finished.find("clocks", readings)
        with keeping(finished.journal.path), interruptible(), ExitStack() as stack:
            workers = [stack.enter_context(Worker(s, options)) for s in subjects]
            _measure(workers, waiting, options, finished, on_progress)
        finished.find("clocks", [*readings, clocks(device)])
    result = Bench(
        checkpoint or str(options.config),
        options,
        machine | {"clocks": finished.found["clocks"]},
        finished.found["ceilings"],
        finished.found["subjects"],
        finished.rows,
    )
    if output is not None:
        result.write(output)
        write_whole(output / RECIPE, to_yaml(options))
    return result


def cells_of(options: BenchOptions) -> list[Cell]:
    """By phase, then batch, then context; memory is that of one sequence."""
    return [
        Cell(phase, context, batch)
        for phase in options.phases
        for batch in (options.batch if phase != "memory" else [1])
        for context in options.context
    ]


def _measure(
    workers: list[Worker],
    cells: list[Cell],
    options: BenchOptions,
    finished: Finished,
    tell: Progress,
) -> None:
    tell("starting", 0, 1)
    for worker in workers:
        worker.start()
    if "subjects" not in finished.found:
        finished.find("subjects", [_about(worker) for worker in workers])
    if "ceilings" not in finished.found:
        tell("ceilings", 0, 1)
        ceilings = workers[0].ask("ceilings")
        if isinstance(ceilings, Failed):
            raise OutOfResources(f"can't time a large copy and matrix product: {ceilings.reason}")
        finished.find("ceilings", ceilings)
    turns = [1 if c.phase == "memory" else options.warmup + options.repeat for c in cells]
    total, done = len(workers) * sum(turns), 0
    for cell, number in zip(cells, turns, strict=True):
        rows = [row_of(cell, worker.subject.name) for worker in workers]
        for turn in range(number):
            for worker, row in zip(workers, rows, strict=True):
                tell(f"{cell}: {worker.subject.name}", done, total)
                _take_turn(worker, cell, row, measured=turn >= number - options.repeat)
                done += 1
        finished.add(rows)


def _take_turn(worker: Worker, cell: Cell, row: Row, *, measured: bool) -> None:
    if row.error is not None:
        return
    answer = worker.ask(cell)
    if isinstance(answer, Failed):
        row.error = answer.reason
    elif measured:
        row.add(answer)


def _about(worker: Worker) -> dict[str, Any]:
    answer = worker.ask("about")
    if isinstance(answer, Failed):
        return {"subject": worker.subject.name, "error": answer.reason}
    about: dict[str, Any] = answer
    return about
