"""The main job on examples/demo-model: convert, heal, compare, look inside, generate.

Each step is a ``hysparse`` command, shown before it runs; results go to demo-out.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from recall_text import recall_document
from rich.console import Console
from rich.table import Table

ROOT, OUT = Path(__file__).parent.parent, Path("demo-out")
DENSE, RECIPE = Path("examples/demo-model"), Path("recipes/demo.yaml")
TOOL = Path(sys.executable).with_name("hysparse")


def hysparse(*words: str | Path) -> str:
    """Run a command of the tool, which prints to the terminal or, with --json, is returned."""
    line = [*map(str, words), "--recipe", str(RECIPE)]
    print("\n$ hysparse", *line, flush=True)
    stdout = subprocess.PIPE if "--json" in words else None
    with (OUT / "prompt.txt").open() as stdin:
        done = subprocess.run([TOOL, *line], stdin=stdin, stdout=stdout, text=True, check=True)
    return done.stdout


os.chdir(ROOT)
OUT.mkdir(exist_ok=True)
rng = random.Random(1)
texts = [recall_document(480, rng) for _ in range(400)]
prompt, _, answer = texts.pop().rpartition(":")
(OUT / "prompt.txt").write_text(f"{prompt}:")
(OUT / "recall.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
for layout in ("hysparse", "hybrid-swa"):
    hysparse("convert", DENSE, OUT / layout, "--layout", layout, "--overwrite")
    data = ("--data", OUT / "recall.jsonl", "--teacher", DENSE, "--overwrite")
    hysparse("finetune", OUT / layout, OUT / f"{layout}-healed", *data)

names = ("hysparse", "hybrid-swa", "hysparse-healed", "hybrid-swa-healed")
models = [DENSE, *(OUT / name for name in names)]
scores = json.loads(hysparse("eval", *models, "--json"))["checkpoints"]
against = [word for model in models[1:] for word in ("--against", model)]
only = ("--subjects", "dense", "--phases", "prefill", "--json")
rows = json.loads(hysparse("bench", DENSE, *against, *only))["rows"]
held = [row["kv_bytes"] for row in rows]
lengths = [f"{cell['tokens']} tokens" for cell in scores[0]["retrieval"]]
table = Table("Recall from the context", *lengths, "KV bytes")
for model, score, kv_bytes in zip(models, scores, held, strict=True):
    recall = [f"{cell['correct'] / cell['questions']:.0%}" for cell in score["retrieval"]]
    table.add_row(model.name, *recall, f"{kv_bytes:,}")
Console().print(table)

hysparse("inspect-topk", OUT / "hysparse-healed", "--data", OUT / "recall.jsonl")
hysparse("generate", OUT / "hysparse-healed", "--max-new-tokens", "3")
print(f"The prompt is demo-out/prompt.txt, and the answer{answer}.")
