"""The curves of a study: loss by position, and retrieval by length of the context.

    pip install matplotlib
    python examples/22_retrofit_plot.py out/study.64.json retrofit-64.png

Each model's loss is drawn as its difference from the second one, which is the dense model trained
on the same text; so that one is the line at 0.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

if __name__ == "__main__":
    source, picture = map(Path, sys.argv[1:])
    study = json.loads(source.read_text())
    length = study["options"]["sequence_tokens"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    healed = study["checkpoints"][1]["loss"]["by_position"]
    for row in study["checkpoints"]:
        losses, name = row["loss"]["by_position"], Path(row["checkpoint"]).name
        middles = [(part + 0.5) * length / len(losses) for part in range(len(losses))]
        left.plot(middles, [a - b for a, b in zip(losses, healed, strict=True)], "o-", label=name)
        by_length: dict[int, list[float]] = defaultdict(list)
        for cell in row["retrieval"]:
            by_length[cell["tokens"]].append(cell["accuracy"])
        right.plot(by_length.keys(), [100 * mean(forms) for forms in by_length.values()], "o-")
    left.set(xlabel="position in tokens", ylabel="loss, nats per token above dense, healed alike")
    right.set(
        xlabel="context in tokens", ylabel="retrieval, % of answers", xscale="log", ylim=(0, 102)
    )
    right.set_xticks(list(by_length), [f"{tokens:,}" for tokens in by_length], minor=False)
    right.minorticks_off()
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(picture, dpi=110)
