"""What ``hysparse bench kernels`` found: a table, JSON, and the Markdown of docs/kernels.md."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hysparse_cli.bench.kernels.clock import Latency
from hysparse_cli.bench.kernels.targets import Target, targets_of
from hysparse_cli.bench.kernels.work import Shape
from hysparse_cli.files.output import write_whole
from hysparse_cli.recipe import KernelBenchOptions
from hysparse_kernels.tolerance import Error

if TYPE_CHECKING:
    from hysparse_cli.tables import Table

SCHEMA = "hysparse.bench-kernels/1"
TERA = 1e12


@dataclass(frozen=True)
class Ceiling:
    """What this machine reached in this run: "copy" in bytes, "matmul" in FLOPs, per second."""

    name: str
    unit: str
    per_second: float

    def __str__(self) -> str:
        return f"{self.name} {_rate(self.per_second, self.unit)}"


@dataclass(frozen=True)
class PeerTime:
    """A peer's latency, or why there is none."""

    latency: Latency | None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {**(self.latency.as_json() if self.latency else {}), "error": self.error}


@dataclass(frozen=True)
class Verdict:
    """A target, and what was reached; None where nothing it compares with ran."""

    target: Target
    value: float | None

    def __str__(self) -> str:
        if self.value is None:
            return f"unknown: {self.target}"
        answer = "met" if self.target.met(self.value) else "missed"
        return f"{self.target.show(self.value)}: {answer} {self.target}"

    def as_json(self) -> dict[str, Any]:
        met = None if self.value is None else self.target.met(self.value)
        what = {"measure": self.target.measure, "against": list(self.target.against)}
        bounds = {"must": self.target.must, "aim": self.target.aim}
        return {"target": str(self.target), **what, **bounds, "value": self.value, "met": met}


@dataclass(frozen=True)
class Row:
    """One op at one shape, or the error in its place.

    failed: whether the error is the kernel's own fault.
    """

    name: str
    shape: Shape
    backend: str | None = None
    latency: Latency | None = None
    errors: list[Error] = field(default_factory=list)
    flops: float = 0.0
    moved: int = 0
    ceiling: Ceiling | None = None
    peers: dict[str, PeerTime] = field(default_factory=dict)
    error: str | None = None
    failed: bool = False

    @property
    def per_second(self) -> float:
        """FLOPs or bytes, as its ceiling is."""
        assert self.latency is not None and self.ceiling is not None
        amount = self.moved if self.ceiling.name == "copy" else self.flops
        return 1e3 * amount / self.latency.median

    @property
    def of_ceiling(self) -> float:
        assert self.ceiling is not None
        return self.per_second / self.ceiling.per_second

    def verdicts(self) -> list[Verdict]:
        if self.latency is None or self.ceiling is None:
            return []
        times = {n: peer.latency.median for n, peer in self.peers.items() if peer.latency}
        of_copy = self.of_ceiling if self.ceiling.name == "copy" else None
        shape = self.shape
        known = targets_of(self.name, group=shape.group, batch=shape.batch, keys=shape.keys)
        return [Verdict(t, t.value(self.latency.median, times, of_copy)) for t in known]

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
        if self.latency is None or self.ceiling is None:
            return row
        return {
            **row,
            **self.latency.as_json(),
            "flops": self.flops,
            "moved_bytes": self.moved,
            "ceiling": self.ceiling.name,
            "per_second": self.per_second,
            "fraction_of_ceiling": self.of_ceiling,
            "peers": {name: peer.as_json() for name, peer in self.peers.items()},
            "targets": [verdict.as_json() for verdict in self.verdicts()],
            "errors": [{**vars(error), "lawful": error.lawful} for error in self.errors],
        }

    def cells(self) -> list[str]:
        """op, shape, latency, rate, peers, targets, errors, as text."""
        if self.latency is None or self.ceiling is None:
            return [self.name, str(self.shape), str(self.error), "", "", "", ""]
        rate = f"{_rate(self.per_second, self.ceiling.unit)}, {self.of_ceiling:.0%}"
        peers = [
            f"{name} {_ms(peer.latency)} ({peer.latency.median / self.latency.median:.2f}x)"
            for name, peer in self.peers.items()
            if peer.latency
        ]
        worst = max(self.errors, key=lambda error: error.kernel / error.allowed)
        wrong = [error for error in self.errors if not error.lawful]
        errors = [f"WRONG {error}" for error in wrong] or [str(worst)]
        verdicts = [str(verdict) for verdict in self.verdicts()]
        lists = ("\n".join(lines) for lines in (peers, verdicts, errors))
        return [self.name, str(self.shape), _ms(self.latency, spread=True), rate, *lists]


COLUMNS = ("op", "shape", "ms", "rate, of ceiling", "peers", "targets", "error / plain torch's")


@dataclass(frozen=True)
class KernelBench:
    """All rows. environment: the device and versions (devices.py)."""

    options: KernelBenchOptions
    environment: dict[str, Any]
    ceilings: list[Ceiling]
    rows: list[Row]

    def failures(self) -> list[str]:
        """Every kernel that is wrong, one line each."""
        return [line for row in self.rows for line in row.failures()]

    def table(self) -> "Table":
        from rich import box

        from hysparse_cli.tables import Table

        table = Table(
            title=self._title(),
            title_justify="left",
            caption="\n".join(self._notes()),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_lines=True,
        )
        for name in COLUMNS:
            table.add_column(name)
        for row in self.rows:
            table.add_row(*row.cells())
        return table

    def markdown(self) -> str:
        """The table as docs/kernels.md has it."""
        lines = [self._title() + ".", ""]
        lines += [f"- {note}" for note in self._notes()]
        lines += ["", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        for row in self.rows:
            cells = [cell.replace("|", "\\|").replace("\n", "<br>") for cell in row.cells()]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "options": self.options.model_dump(mode="json"),
            "environment": self.environment,
            "ceilings": [vars(ceiling) for ceiling in self.ceilings],
            "rows": [row.as_json() for row in self.rows],
            "failures": self.failures(),
        }

    def write(self, folder: Path) -> None:
        """kernels.json and kernels.md, into a folder that is there."""
        write_whole(folder / "kernels.json", json.dumps(self.as_json(), indent=1) + "\n")
        write_whole(folder / "kernels.md", self.markdown())

    def _title(self) -> str:
        env, options = self.environment, self.options
        device = f"{env['device']} ({env['device_name']})"
        return f"Measured on {device}, torch {env['torch']}, {options.dtype}"

    def _notes(self) -> list[str]:
        options = self.options
        names: dict[str, None] = {}
        for row in self.rows:
            if row.backend:
                names[row.backend] = None
        if options.lists:
            lists = f"real lists: {Path(options.lists).name}"
        else:
            lists = "synthetic lists: made up, shared by neighbours about as far as real ones"
        absent = {
            f"{name} ({peer.error})": None
            for row in self.rows
            for name, peer in row.peers.items()
            if peer.latency is None
        }
        missing = [f"not measured: {', '.join(absent)}"] if absent else []
        return [
            f"ceilings of this run: {', '.join(map(str, self.ceilings))}",
            f"blocks of {options.block_size}, {options.top_k_blocks} of them selected, window "
            f"{options.window_tokens}; {lists}",
            f"kernels: {'; '.join(names)}",
            "ms: median (10th to 90th percentile); in brackets by a peer, how many times as long "
            "it takes; decode in a CUDA graph",
            *missing,
            "error: of the output or gradient that is nearest to what is allowed, the largest, "
            f"against the reference in float64; beside it plain torch's in {options.dtype}",
        ]


def _ms(latency: Latency, spread: bool = False) -> str:
    digits = 3 if latency.median >= 0.1 else 4
    text = f"{latency.median:.{digits}f}"
    if not spread:
        return text
    low, high = latency.percentile(10), latency.percentile(90)
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def _rate(per_second: float, unit: str) -> str:
    return f"{per_second / TERA:,.3g} {unit}"
