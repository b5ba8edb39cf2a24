"""Holds what the benchmarks found: as JSON, and as the Markdown of docs/kernels.md."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Shape
from benchmarks.options import Options
from hysparse_cli.bench.timing import Timing
from hysparse_cli.bench.work import Work
from hysparse_cli.files.output import write_whole
from hysparse_kernels.tolerance import Error

SCHEMA = "hysparse.bench-kernels/2"
RESULT, TABLE = "kernels.json", "kernels.md"
RANKS = (10, 90)  # percentiles that stand beside a median
COLUMNS = ("op", "shape", "ms", "rate, of ceiling", "peers", "error / plain torch's")

PeerTime = Timing | str  # a peer's time, or why there is none


@dataclass(frozen=True)
class Ceiling:
    """What this machine reached in this run: "copy" in bytes, "matmul" in FLOPs, per second."""

    name: str
    unit: str
    per_second: float

    def __str__(self) -> str:
        return f"{self.name} {_rate(self.per_second, self.unit)}"


@dataclass(frozen=True)
class Result:
    """One op at one shape, or the error in its place.

    failed: whether the error is the kernel's own fault.
    """

    name: str
    shape: Shape
    backend: str | None = None
    timing: Timing | None = None
    errors: list[Error] = field(default_factory=list)
    work: Work | None = None
    ceiling: Ceiling | None = None
    peers: dict[str, PeerTime] = field(default_factory=dict)
    error: str | None = None
    failed: bool = False

    @property
    def per_second(self) -> float:
        """FLOPs or bytes, as its ceiling is."""
        assert self.timing is not None and self.work is not None and self.ceiling is not None
        amount = self.work.moved if self.ceiling.name == "copy" else self.work.flops
        return 1e3 * amount / self.timing.median

    @property
    def of_ceiling(self) -> float:
        assert self.ceiling is not None
        return self.per_second / self.ceiling.per_second

    def failures(self) -> list[str]:
        """What is wrong with the kernel, one line each."""
        where = f"{self.name} at {self.shape}"
        if self.failed:
            return [f"{where} raised {self.error}"]
        return [
            f"{where} errs by {error.kernel:.2g} in {error.what}, {error.allowed:.2g} allowed"
            for error in self.errors
            if not error.lawful
        ]

    def as_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "op": self.name,
            "shape": vars(self.shape),
            "backend": self.backend,
            "error": self.error,
        }
        if self.timing is None or self.work is None or self.ceiling is None:
            return row
        return {
            **row,
            **_numbers(self.timing),
            "flops": self.work.flops,
            "moved_bytes": self.work.moved,
            "ceiling": self.ceiling.name,
            "per_second": self.per_second,
            "fraction_of_ceiling": self.of_ceiling,
            "peers": {name: _peer_json(peer) for name, peer in self.peers.items()},
            "errors": [{**vars(error), "lawful": error.lawful} for error in self.errors],
        }

    def cells(self) -> list[str]:
        """A text for each of ``COLUMNS``."""
        if self.timing is None or self.ceiling is None:
            return [self.name, str(self.shape), str(self.error), "", "", ""]
        rate = f"{_rate(self.per_second, self.ceiling.unit)}, {self.of_ceiling:.0%}"
        peers = [
            f"{name} {_ms(peer)} ({peer.median / self.timing.median:.2f}x)"
            for name, peer in self.peers.items()
            if isinstance(peer, Timing)
        ]
        worst = max(self.errors, key=lambda error: error.kernel / error.allowed)
        wrong = [error for error in self.errors if not error.lawful]
        errors = [f"WRONG {error}" for error in wrong] or [str(worst)]
        low, high = (f"{self.timing.percentile(rank):.{_digits(self.timing)}f}" for rank in RANKS)
        time = f"{_ms(self.timing)} ({low} to {high})"
        return [self.name, str(self.shape), time, rate, "\n".join(peers), "\n".join(errors)]


@dataclass(frozen=True)
class Benchmarks:
    """All rows. environment: the device and versions (devices.py)."""

    options: Options
    environment: dict[str, Any]
    ceilings: list[Ceiling]
    rows: list[Result]

    def failures(self) -> list[str]:
        """Every kernel that is wrong, one line each."""
        return [line for row in self.rows for line in row.failures()]

    def markdown(self) -> str:
        """The table as docs/kernels.md has it."""
        env = self.environment
        device = f"{env['device']} ({env['device_name']})"
        lines = [f"Measured on {device}, torch {env['torch']}, {self.options.dtype}.", ""]
        lines += [f"- {note}" for note in self._notes()]
        lines += ["", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        for row in self.rows:
            cells = [cell.replace("|", "\\|").replace("\n", "<br>") for cell in row.cells()]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "options": self.options.as_json(),
            "environment": self.environment,
            "ceilings": [vars(ceiling) for ceiling in self.ceilings],
            "rows": [row.as_json() for row in self.rows],
            "failures": self.failures(),
        }

    def write(self, folder: Path) -> None:
        """``RESULT`` and ``TABLE``, into a folder that is there."""
        write_whole(folder / RESULT, json.dumps(self.as_json(), indent=1) + "\n")
        write_whole(folder / TABLE, self.markdown())

    def _notes(self) -> list[str]:
        options = self.options
        backends = dict.fromkeys(row.backend for row in self.rows if row.backend)
        if options.lists:
            lists = f"real lists: {options.lists.name}"
        else:
            lists = "synthetic lists: made up, shared by neighbours about as far as real ones"
        absent = dict.fromkeys(
            f"{name} ({peer})"
            for row in self.rows
            for name, peer in row.peers.items()
            if isinstance(peer, str)
        )
        return [
            f"ceilings of this run: {', '.join(map(str, self.ceilings))}",
            f"blocks of {options.block_size}, {options.top_k_blocks} of them selected, window "
            f"{options.window_tokens}; {lists}",
            f"kernels: {'; '.join(backends)}",
            "ms: median (10th to 90th percentile); in brackets by a peer, how many times as long "
            "it takes; decode in a CUDA graph",
            *([f"not measured: {', '.join(absent)}"] if absent else []),
            "error: of the output or gradient that is nearest to what is allowed, the largest, "
            f"against the reference in float64; beside it plain torch's in {options.dtype}",
        ]


def _numbers(timing: Timing) -> dict[str, float | int]:
    percentiles = {f"p{rank}_latency_ms": timing.percentile(rank) for rank in RANKS}
    return {
        "median_latency_ms": timing.median,
        **percentiles,
        "samples": len(timing.samples_ms),
    }


def _peer_json(peer: PeerTime) -> dict[str, Any]:
    if isinstance(peer, str):
        return {"error": peer}
    return {**_numbers(peer), "error": None}


def _digits(timing: Timing) -> int:
    return 3 if timing.median >= 0.1 else 4


def _ms(timing: Timing) -> str:
    return f"{timing.median:.{_digits(timing)}f}"


def _rate(per_second: float, unit: str) -> str:
    return f"{per_second / 1e12:,.3g} {unit}"
