"""Retrofits of novels-25m, healed on the same tokens, beside the dense model and hybrid SWA.

    python examples/21_retrofit_study.py novels-25m healing.jsonl.xz held-out.jsonl.xz out 4M

heals with 4M tokens, 1% of the pretraining's, at three learning rates; the one with the least loss
over the last eighth of the steps, of tokens that are new to it, is taken for more seeds. 21M heals
with five times as many, half of them a step, and the rate goes with the root of that. All are
evaluated on held-out text (out/study.4M.json). Each GPU makes two runs at a time; none twice."""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from retrofit_healing import Run, heal, judge
from retrofit_starts import STARTS

RATES = (3e-4, 6e-4, 1.2e-3)
PHASES = {"4M": (64, 8, 1.0), "21M": (640, 4, 0.5**0.5)}  # steps, rows of each, rate x


def take_gpu(turns: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(turns.get())


if __name__ == "__main__":
    dense, text, held_out, out, tokens = *sys.argv[1:4], Path(sys.argv[4]), sys.argv[5]
    steps, batch_rows, factor = PHASES[tokens]
    gpus, spawn = max(1, torch.cuda.device_count()), multiprocessing.get_context("spawn")
    turns = spawn.Manager().Queue()
    for turn in range(2 * gpus):
        turns.put(turn % gpus)
    pool = ProcessPoolExecutor(2 * gpus, spawn, take_gpu, (turns,))
    work = partial(heal, dense=dense, text=text, out=out)

    swept = [name for name, start in STARTS.items() if start.rate_of == name]
    sweep = [Run(name, 64, 8, rate, 0) for name in swept for rate in RATES]
    losses = [row["training_loss"] for row in pool.map(work, sweep)]
    ranked = [run for _, run in sorted(zip(losses, sweep, strict=True))]
    best = {name: next(run for run in ranked if run.start == name) for name in swept}
    runs = sweep if tokens == "4M" else []
    for name, start in STARTS.items():
        rate = factor * best[start.rate_of].learning_rate
        for seed in range(start.seeds if tokens == "4M" else start.long_seeds):
            run = Run(name, steps, batch_rows, rate, seed)
            runs += [run] if run not in runs else []
    rows: list[Any] = [{"start": "dense, as it is"}, *pool.map(work, runs)]
    checkpoints = [dense, *(str(run.folder(out) / "healed") for run in runs)]
    shares = [checkpoints[turn :: 2 * gpus] for turn in range(2 * gpus)]
    judged = list(pool.map(partial(judge, held_out=held_out), filter(None, shares)))
    for number, row in enumerate(rows):
        row |= judged[number % len(judged)][number // len(judged)]
    pool.shutdown()
    study = {"rates": {name: run.learning_rate for name, run in best.items()}, "runs": rows}
    (out / f"study.{tokens}.json").write_text(json.dumps(study, indent=1) + "\n")
