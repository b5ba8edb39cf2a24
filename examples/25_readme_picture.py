"""Draw the README's picture from the figures in docs/data.

    python examples/25_readme_picture.py docs/data/kv-and-retrieval.png

Left: bytes of keys and values against the context, of the paper's two models. Right: retrieval at
8k tokens against those bytes, of a real model of 25M parameters after healing.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

DATA = Path(__file__).parents[1] / "docs" / "data"
MODELS = {"7b": "7B, 1:3", "80b": "80B, 1:11"}
LABELS = {"dense": "dense", "hysparse 1:3": "HySparse 1:3", "hysparse 1:11": "HySparse 1:11"}


def memory(axes: Any) -> None:
    for color, (name, title) in zip(("tab:blue", "tab:orange"), MODELS.items(), strict=True):
        bench = json.loads((DATA / f"bench-{name}-decode.json").read_text())
        rows = [row for row in bench["rows"] if row["phase"] == "memory" and row["batch"] == 1]
        for subject, style in (("dense-cudnn", "--"), ("hysparse", "-")):
            own = sorted(
                (r["context_tokens"], r["kv_bytes"]) for r in rows if r["subject"] == subject
            )
            label = f"{title}, {'HySparse' if subject == 'hysparse' else 'dense'}"
            axes.plot(*zip(*own, strict=True), style, marker="o", color=color, label=label)
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="KV cache, GiB")
    ticks = [2048, 8192, 32768, 131072]
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    axes.set_yticks([2**power for power in (26, 28, 30, 32, 34)], ["1/16", "1/4", "1", "4", "16"])
    axes.minorticks_off()
    axes.legend(frameon=False)


def retrieval(axes: Any) -> None:
    runs = json.loads((DATA / "retrofit-corrected.json").read_text())["runs"]
    found = defaultdict(list)
    for run in runs:
        if run["start"] in LABELS and "steps" in run and run["tokens"] < 5e6:
            right = [share for _, tokens, share in run["retrieval"] if tokens == 8192]
            found[run["start"]].append((run["kv_bytes"] / 2**20, 100 * sum(right) / len(right)))
    for start, points in found.items():
        axes.plot(*zip(*points, strict=True), "o", label=LABELS[start])
    axes.set(xlim=(0, 55), ylim=(80, 101), xlabel="KV cache at 8k tokens, MiB")
    axes.set(ylabel="retrieval at 8k tokens, % of answers")
    axes.legend(frameon=False, loc="lower right")


if __name__ == "__main__":
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    memory(left)
    retrieval(right)
    figure.savefig(sys.argv[1], dpi=110)
