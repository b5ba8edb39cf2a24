"""The curves of a study: loss by position, and retrieval by length of the context.

    python examples/22_retrofit_plot.py out/corrected.json retrofit.png

A line is the mean over the seeds, its band their range. Losses are drawn as differences from that
of the dense model trained on the same text.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np


def curves(runs: list[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By start, its best learning rate's: losses (seeds, parts), and retrieval (seeds, lengths)."""
    found = {}
    for name in dict.fromkeys(run["start"] for run in runs):
        own = [run for run in runs if run["start"] == name]
        rates = [run["learning_rate"] for run in own]  # of a sweep, the one with most seeds
        own = [run for run in own if run["learning_rate"] == max(rates, key=rates.count)]
        accuracy: dict[int, list[float]] = defaultdict(list)
        for run in own:
            for _, tokens, right in run["retrieval"]:
                accuracy[tokens].append(right)
        by_length = [np.reshape(cells, (len(own), -1)).mean(1) for cells in accuracy.values()]
        losses = np.array([run["loss_by_position"] for run in own])
        found[name] = losses, 100 * np.stack(by_length, 1)
    return found


def draw(axes: Any, x: list[float], values: np.ndarray, label: str) -> None:
    axes.plot(x, values.mean(0), "o-", label=label)
    axes.fill_between(x, values.min(0), values.max(0), alpha=0.15)


if __name__ == "__main__":
    study = json.loads(Path(sys.argv[1]).read_text())
    runs = [run for run in study["runs"] if "steps" in run]
    lengths = sorted({tokens for _, tokens, _ in runs[0]["retrieval"]})
    amounts = sorted({run["tokens"] for run in runs})
    shape, size = (len(amounts), 2), (12, 4.2 * len(amounts))
    figure, rows = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for (left, right), tokens in zip(rows, amounts, strict=True):
        drawn = curves([run for run in runs if run["tokens"] == tokens])
        dense = drawn["dense"][0].mean(0)
        middles = [(part + 0.5) * lengths[-1] / len(dense) for part in range(len(dense))]
        for name, (losses, retrieval) in drawn.items():
            draw(left, middles, losses - dense, name)
            draw(right, lengths, retrieval, name)
        left.set(title=f"{tokens / 1e6:.0f}M tokens", xlabel="position", ylabel="loss - dense")
        right.set(xlabel="context, tokens", ylabel="retrieval, % of answers", xscale="log")
        right.set_xticks(lengths, map(str, lengths))
        right.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(sys.argv[2], dpi=100)
