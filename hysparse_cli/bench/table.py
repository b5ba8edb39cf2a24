"""Writes a row as cells of a table, and the notes below the table."""

from typing import TYPE_CHECKING, Any

from hysparse_cli.bench.break_even import break_even_notes
from hysparse_cli.bench.exactness import CHECKED_QUERIES, errors_in
from hysparse_cli.bench.rows import Row
from hysparse_cli.bench.timing import milliseconds
from hysparse_cli.convert.plan import context_name, readable

if TYPE_CHECKING:
    from hysparse_cli.bench.result import Bench

CELL = ("B x tokens", "subject")
TIMED = ("tok/s", "x dense", "attn ms", "x dense", "of floor")
COLUMNS = {
    "memory": (*CELL, "KV held", "KV counted", "x dense", "weights", "largest batch", "x dense"),
    "prefill": (*CELL, "TTFT ms", *TIMED),
    "decode": (*CELL, "TPOT ms", "p99", *TIMED),
    "train": (*CELL, "step ms", *TIMED, "peak"),
}


def cells_of_row(row: Row, ceilings: dict[str, float], ratios: dict[str, float]) -> list[str]:
    """As many cells as the row's phase has columns."""
    cells = [f"{row.batch} x {context_name(row.context)}", row.subject]
    if row.error is not None:
        cells.append(row.error)
    elif row.phase == "memory":
        values = row.values
        cells += [
            "" if values["kv_bytes"] is None else readable(values["kv_bytes"]),
            readable(values["arithmetic_kv_bytes"]),
            _ratio(ratios.get("kv_bytes")),
            readable(values["weight_bytes"]),
            f"{values['largest_batch']:,}",
            _ratio(ratios.get("largest_batch")),
        ]
    else:
        cells += _timed(row, ceilings, ratios)
    return cells + [""] * (len(COLUMNS[row.phase]) - len(cells))


def _timed(row: Row, ceilings: dict[str, float], ratios: dict[str, float]) -> list[str]:
    assert row.time is not None and row.attention is not None
    fractions = [row.of_floor(what, ceilings) for what in ("work", "attention_work")]
    cells = [str(row.time)]
    if row.phase == "decode":
        cells = [milliseconds(time) for time in (row.time.median, row.time.percentile(99))]
    cells += [
        f"{row.tokens_per_second():,.0f}",
        _ratio(ratios.get("time")),
        milliseconds(row.attention.median),
        _ratio(ratios.get("attention")),
        "/".join(f"{fraction:.0%}" for fraction in fractions if fraction is not None),
    ]
    if row.phase == "train":
        peak = row.values.get("peak_memory_bytes")
        cells.append("" if peak is None else readable(peak))
    return cells


def caption(bench: "Bench") -> list[str]:
    """Who the subjects are, and how the numbers came about, one line each."""
    ceilings, options = bench.ceilings, bench.options
    lists = {
        "own": "those the model selects for random tokens",
        "local": "made up, shared by neighbouring tokens about as far as a trained model's",
    }
    spread = "median ± half the range" if options.repeat > 1 else "of one turn, spread unknown"
    notes = [_subject_line(subject) for subject in bench.subjects]
    notes += [
        "x dense: times faster, smaller or more than the best dense subject; attn: the attention "
        "calls alone; of floor: how much of the time the model's and the attention's own work "
        f"takes at the least, at {ceilings['bytes_per_second'] / 1e12:.3g} TB/s and "
        f"{ceilings['flops_per_second'] / 1e12:.3g} TFLOP/s as a copy and a matrix product reached "
        "(more than 100%: from a cache)",
        f"times: {spread}; {options.warmup} to warm up and {options.repeat} "
        f"measured, in turns; decode: {options.decode_tokens} steps each, at that many tokens in a "
        f"static cache; blocks read: {lists.get(options.lists, options.lists)}",
    ]
    return [*notes, *_exactness(bench), *break_even_notes(bench), _stamp(bench.environment)]


def _exactness(bench: "Bench") -> list[str]:
    """A line on the largest errors of all rows, where attention was timed."""
    largest: dict[str, float] = {}
    for row in bench.rows:
        for name, error in errors_in(row.values).items():
            largest[name] = max(error, largest.get(name, 0.0))
    if not largest:
        return []
    said = ", ".join(
        f"{n.removesuffix('_error').replace('_', ' ')} {e:.1e}" for n, e in largest.items()
    )
    return [
        f"errors against float64, the largest: {said} (last {CHECKED_QUERIES} queries, forward)"
    ]


def _stamp(environment: dict[str, Any]) -> str:
    names = ("driver", "cuda", "triton", "transformers", "hysparse", "commit")
    known = [f"{name} {environment[name]}" for name in names if environment[name]]
    readings = [reading for reading in environment["clocks"] if reading]
    if readings:
        clocks = " to ".join(f"{reading.get('sm_clock_mhz', 0):,.0f}" for reading in readings)
        known.append(f"SM clock {clocks} MHz before and after")
    return ", ".join(known)


def _subject_line(subject: dict[str, Any]) -> str:
    if "error" in subject:
        return f"{subject['subject']}: {subject['error']}"
    kernels = "; ".join(sorted(set(subject["kernels"].values())))
    weights = "random weights" if subject["weights"] == "random" else subject["weights"]
    parts = [subject["attention"], subject["dtype"], weights]
    if kernels:
        parts.append(f"kernels: {kernels}")
    return f"{subject['subject']}: {', '.join(parts)}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
