"""Draws PNG plots from a bench's JSON: time, speed-up and memory against context."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hysparse_cli.convert.plan import context_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 1 << 30
SIZE_INCHES = (6.4, 4.2)
DOTS_PER_INCH = 130
COLORS = {
    "dense": "C0",
    "dense-cudnn": "C0",
    "dense-flash": "C1",
    "hybrid-swa": "C2",
    "hysparse": "C3",
}
TIMES = {
    "prefill": ("median_ttft_ms", "time to first token, ms"),
    "decode": ("median_tpot_ms", "time per output token, ms"),
    "train": ("median_step_ms", "training step, ms"),
}


@dataclass(frozen=True)
class Plot:
    """One picture: ``lines`` are subject -> (tokens, value) each.

    limit: a value to draw across, and its name, or None. dashed: subjects whose line lies on
    another's, which has to be seen, too.
    """

    name: str
    title: str
    unit: str
    lines: dict[str, list[tuple[int, float]]]
    log: bool = False
    limit: tuple[float, str] | None = None
    dashed: tuple[str, ...] = ()

    def figure(self) -> "Figure":
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogFormatter, NullLocator

        figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        axes = figure.add_subplot()
        for subject, points in self.lines.items():
            xs, ys = zip(*points, strict=True)
            name, _, part = subject.partition(", ")
            style = ":" if part else "--" if subject in self.dashed else "-"
            axes.plot(xs, ys, style, color=COLORS.get(name), marker="o", label=subject)
        if self.limit is not None:
            axes.axhline(self.limit[0], color="black", linestyle="--", label=self.limit[1])
        axes.set_xscale("log", base=2)
        contexts = sorted({x for points in self.lines.values() for x, _ in points})
        axes.set_xticks(contexts, [context_name(count) for count in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
        if self.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(self.unit)
        axes.set_title(self.title)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure


@dataclass
class _Lines:
    """Points by subject, those that were measured."""

    by_subject: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, row: dict[str, Any], value: float | None) -> None:
        if value is not None:
            self.by_subject.setdefault(row["subject"], []).append((row["context_tokens"], value))


def plots_of(result: dict[str, Any]) -> list[Plot]:
    """The plots of what ``Bench.as_json`` gives; one that would be empty is left out."""
    rows = [row for row in result["rows"] if row["error"] is None]
    environment = result["environment"]
    device = environment["device_name"] if environment["device"] == "cuda" else "this machine"
    title = f"{result['model'].rstrip('/').rpartition('/')[2]}, {device}"
    plots = []
    for phase, (metric, unit) in TIMES.items():
        for batch in sorted({row["batch"] for row in rows if row["phase"] == phase}):
            chosen = [row for row in rows if (row["phase"], row["batch"]) == (phase, batch)]
            times, ratios = _Lines(), _Lines()
            for row in chosen:
                times.add(row, row[metric])
                ratios.add(row, row.get("time_times_dense"))
                attention = {**row, "subject": f"{row['subject']}, attention"}
                ratios.add(attention, row.get("attention_times_dense"))
            name = f"{phase}-batch-{batch}"
            where = f"{title}, batch {batch}"
            plots.append(Plot(name, f"{phase}: {where}", unit, times.by_subject, log=True))
            plots.append(_speedup(f"{name}-speedup", f"{phase}: {where}", ratios))
    return [plot for plot in [*plots, _memory(rows, title, device)] if plot.lines]


def _speedup(name: str, title: str, ratios: _Lines) -> Plot:
    lines = {n: ps for n, ps in ratios.by_subject.items() if not n.startswith("dense")}
    return Plot(name, title, "times faster than the best dense", lines, limit=(1.0, "dense"))


def _memory(rows: list[dict[str, Any]], title: str, device: str) -> Plot:
    lines, limit = _Lines(), None
    for row in rows:
        if row["phase"] == "memory":
            lines.add(row, (row["weight_bytes"] + row["arithmetic_kv_bytes"]) / GIB)
            limit = (row["total_bytes"] / GIB, f"memory of {device}")
    what = "weights and KV cache of one sequence, GiB"
    name, same = f"memory: {title}", ("dense-flash", "hysparse")
    return Plot("memory", name, what, lines.by_subject, log=True, limit=limit, dashed=same)
