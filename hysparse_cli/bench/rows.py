"""Holds a measurement: one subject at one cell, its samples, and what they come to."""

from dataclasses import asdict, dataclass, field
from typing import Any

from hysparse_cli.bench.exactness import is_error
from hysparse_cli.bench.timing import Timing
from hysparse_cli.bench.work import Work
from hysparse_cli.bench.worker import Cell

# the name of a phase's own time, as in vLLM's benches
TIMES = {"prefill": "ttft", "decode": "tpot", "train": "step"}


@dataclass
class Row:
    """samples: lists of milliseconds, by name. values: numbers that are the same in every turn.

    error: in place of both where there is no measurement.
    """

    subject: str
    phase: str
    context: int
    batch: int
    samples: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def cell(self) -> tuple[str, int, int]:
        return self.phase, self.context, self.batch

    def add(self, measured: dict[str, Any]) -> None:
        """One more turn; the highest peak and the largest error count."""
        for name, value in measured.items():
            if name.endswith("s_ms"):
                self.samples.setdefault(name, []).extend(value)
            elif isinstance(value, Work):
                self.values[name] = asdict(value)
            else:
                before = self.values.get(name)
                rises = name == "peak_memory_bytes" or is_error(name)
                self.values[name] = max(before, value) if rises and before is not None else value

    @property
    def time(self) -> Timing | None:
        """The phase's own: TTFT, TPOT or a training step."""
        return self._timing(TIMES.get(self.phase, ""))

    @property
    def attention(self) -> Timing | None:
        """The attention part's."""
        return self._timing("attention")

    @property
    def kv_bytes(self) -> int | None:
        """As allocated, or counted where they were not."""
        values = self.values
        held: int | None = values.get("kv_bytes") or values.get("arithmetic_kv_bytes")
        return held

    def tokens_per_second(self) -> float | None:
        """Tokens that are read, written or trained on."""
        if self.time is None:
            return None
        tokens = self.batch * (1 if self.phase == "decode" else self.context)
        return 1e3 * tokens / self.time.median

    def of_floor(self, what: str, ceilings: dict[str, float]) -> float | None:
        """How much of the time could not be less: 1 at the floor. what: "work" or "attention_work".

        ceilings: as ``measured_ceilings`` gives them.
        """
        timing = self.time if what == "work" else self.attention
        if timing is None or what not in self.values:
            return None
        work = Work(**self.values[what])
        floor = work.floor_ms(ceilings["flops_per_second"], ceilings["bytes_per_second"])
        return floor / timing.median

    def as_json(self, ceilings: dict[str, float], times_dense: dict[str, float]) -> dict[str, Any]:
        """All of it, one level deep; times_dense: how many times less than dense, by measure."""
        row: dict[str, Any] = {
            "subject": self.subject,
            "phase": self.phase,
            "context_tokens": self.context,
            "batch": self.batch,
            "error": self.error,
        }
        if self.error is not None:
            return row
        row |= {n: v for n, v in self.values.items() if n not in ("work", "attention_work")}
        for name, timing in ((TIMES.get(self.phase), self.time), ("attention", self.attention)):
            if timing is not None:
                row |= timing.as_json(str(name))
        if self.time is not None:
            row["tokens_per_second"] = self.tokens_per_second()
            for what in ("work", "attention_work"):
                row[f"{what}_flops"] = self.values[what]["flops"]
                row[f"{what}_bytes"] = self.values[what]["moved"]
            row["fraction_of_floor"] = self.of_floor("work", ceilings)
            row["attention_fraction_of_floor"] = self.of_floor("attention_work", ceilings)
        return row | {f"{name}_times_dense": ratio for name, ratio in times_dense.items()}

    def _timing(self, name: str) -> Timing | None:
        samples = self.samples.get(f"{name}s_ms")
        return Timing(samples) if samples else None


def row_of(cell: Cell, subject: str) -> Row:
    return Row(subject, cell.phase, cell.context, cell.batch)


def times_dense(row: Row, rows: list[Row]) -> dict[str, float]:
    """How many times less than the best dense subject in the same cell, by measure.

    Time, attention time and KV bytes; of the largest batch, how many times more.
    """
    dense = [
        r for r in rows if r.cell == row.cell and r.subject.split("-")[0] == "dense" and not r.error
    ]
    found: dict[str, float] = {}
    if not dense or row.error is not None:
        return found
    for name in ("time", "attention"):
        mine = getattr(row, name)
        others = [timing.median for r in dense if (timing := getattr(r, name))]
        if mine is not None and others:
            found[name] = min(others) / mine.median
    if row.kv_bytes:
        found["kv_bytes"] = min(r.kv_bytes for r in dense if r.kv_bytes) / row.kv_bytes
    most = max(r.values.get("largest_batch", 0) for r in dense)
    if most:
        found["largest_batch"] = row.values["largest_batch"] / most
    return found
