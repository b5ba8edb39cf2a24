"""Finds the context from which on HySparse is faster than dense: short ones lose."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hysparse_cli.bench.result import Bench

WHAT = {"time": "the model", "attention": "the attention alone"}


def break_even(ratios: Mapping[int, float]) -> float | None:
    """The tokens at which ``ratios``, dense over HySparse by context, last come to 1.

    In between two contexts, ratio and context are taken to grow by powers. 0 where the shortest
    context is faster already, None where the longest is not yet.
    """
    contexts = sorted(ratios)
    slower = [context for context in contexts if ratios[context] < 1]
    if not slower:
        return 0.0
    before = slower[-1]
    if before == contexts[-1]:
        return None
    after = contexts[contexts.index(before) + 1]
    low, high = math.log(ratios[before]), math.log(ratios[after])
    steps = -low / (high - low)
    return float(before * (after / before) ** steps)


def break_even_notes(bench: "Bench") -> list[str]:
    """A line for each phase and batch that was timed."""
    notes = []
    ours = [row for row in bench.rows if row.subject == "hysparse" and row.time is not None]
    for phase, batch in dict.fromkeys((row.phase, row.batch) for row in ours):
        rows = [row for row in ours if (row.phase, row.batch) == (phase, batch)]
        said: dict[str, list[str]] = {}
        for what, name in WHAT.items():
            found = {row.context: bench.times_dense(row).get(what) for row in rows}
            ratios = {context: ratio for context, ratio in found.items() if ratio is not None}
            if ratios:
                said.setdefault(_words(break_even(ratios), max(ratios)), []).append(name)
        parts = [f"{' and '.join(names)} {words}" for words, names in said.items()]
        if parts:
            notes.append(f"hysparse, {phase}, batch {batch}: {', '.join(parts)}")
    return notes


def _words(tokens: float | None, longest: int) -> str:
    if tokens is None:
        return f"slower than dense up to {longest:,} tokens"
    if tokens == 0:
        return "faster than dense throughout"
    return f"faster than dense from about {float(f'{tokens:.2g}'):,.0f} tokens on"
