"""What ``hysparse bench`` found, as a table and as JSON."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hysparse_cli.bench.clock import Timing
from hysparse_cli.loading import short_names
from hysparse_cli.recipe import BenchOptions

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "hysparse.bench/1"
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is measured; ``kernels`` is the backend chosen for each op, if any."""

    checkpoint: str
    attention: str
    dtype: str
    kernels: dict[str, str]


@dataclass(frozen=True)
class Measurement:
    """One checkpoint at one context and batch; ``allocated``, ``ttft`` and ``tpot`` are None where
    memory ran out."""

    checkpoint: str
    context: int
    batch: int
    arithmetic_kv_bytes: int
    allocated_kv_bytes: int | None
    ttft: Timing | None
    tpot: Timing | None

    def as_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "checkpoint": self.checkpoint,
            "context_tokens": self.context,
            "batch": self.batch,
            "arithmetic_kv_bytes": self.arithmetic_kv_bytes,
            "allocated_kv_bytes": self.allocated_kv_bytes,
            "error": None,
        }
        if self.ttft is None or self.tpot is None:
            return {**row, "error": OUT_OF_MEMORY}
        throughput = 1e3 * self.batch / self.tpot.median
        return {
            **row,
            **self.ttft.as_json("ttft"),
            **self.tpot.as_json("tpot"),
            "output_throughput": throughput,
        }


@dataclass(frozen=True)
class Bench:
    """All measurements, the subjects in the order given: the checkpoint, then those it is against.

    environment: the device and versions (devices.py).
    """

    options: BenchOptions
    environment: dict[str, Any]
    subjects: list[Subject]
    rows: list[Measurement]

    def table(self) -> "Table":
        from rich import box
        from rich.table import Table

        env = self.environment
        title = f"{env['device']} ({env['device_name']}), torch {env['torch']}"
        table = Table(
            title=f"Measured on {title}",
            title_justify="left",
            caption=self._caption(),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
        )
        columns = ("context", "batch", "KV held", "counted", "TTFT ms", "TPOT ms")
        table.add_column("checkpoint")
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        names = self._names()
        for row in self.rows:
            first = row.checkpoint == self.subjects[0].checkpoint
            if first and row is not self.rows[0] and len(names) > 1:
                table.add_section()
            cells = [names[row.checkpoint], f"{row.context:,}", f"{row.batch:,}"]
            if row.allocated_kv_bytes is None:
                cells += [OUT_OF_MEMORY, _bytes(row.arithmetic_kv_bytes), "", ""]
            else:
                sizes = (row.allocated_kv_bytes, row.arithmetic_kv_bytes)
                cells += [*map(_bytes, sizes), str(row.ttft), str(row.tpot)]
            table.add_row(*cells)
        return table

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "options": self.options.model_dump(mode="json"),
            "environment": self.environment,
            "subjects": [vars(subject) for subject in self.subjects],
            "rows": [row.as_json() for row in self.rows],
        }

    def _names(self) -> dict[str, str]:
        checkpoints = [subject.checkpoint for subject in self.subjects]
        return dict(zip(checkpoints, short_names(checkpoints), strict=True))

    def _caption(self) -> str:
        names = self._names()
        lines = []
        for subject in self.subjects:
            ops = sorted(set(subject.kernels.values()))
            kernels = f", kernels: {'; '.join(ops)}" if ops else ""
            name = names[subject.checkpoint]
            lines.append(f"{name}: {subject.attention}, {subject.dtype}{kernels}")
        repeats = f"median of {self.options.repeat} ± half their range"
        return "\n".join([*lines, f"{repeats}; TPOT over {self.options.decode_tokens} tokens"])


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
