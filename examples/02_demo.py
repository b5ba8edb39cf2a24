"""The main job on examples/demo-model: convert, heal, compare, look inside, generate.

    python examples/02_demo.py

Every step is a ``hysparse`` command, printed before it runs. Results go to demo-out.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

from recall_text import recall_document
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
DENSE, RECIPE, OUT = HERE / "demo-model", HERE.parent / "recipes" / "demo.yaml", Path("demo-out")
LAYOUTS = ("hysparse", "hybrid-swa")
console = Console()


def hysparse(*words: str | Path, quiet: bool = False) -> str:
    """Run a command of the tool; return what it printed."""
    line = [*map(str, words), "--recipe", str(RECIPE)]
    console.print(f"\n$ hysparse {' '.join(line)}", style="bold", markup=False, soft_wrap=True)
    tool = Path(sys.executable).with_name("hysparse")
    result = subprocess.run([tool, *line], stdout=subprocess.PIPE, text=True, check=True)
    if not quiet:
        sys.stdout.write(result.stdout)
    return result.stdout


OUT.mkdir(exist_ok=True)
rng = random.Random(1)
texts = [recall_document(480, rng) for _ in range(400)]
(OUT / "recall.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
for layout in LAYOUTS:
    hysparse("convert", DENSE, OUT / layout, "--layout", layout, "--overwrite")
    healed = OUT / f"{layout}-healed"
    data = ("--data", OUT / "recall.jsonl", "--teacher", DENSE)
    hysparse("finetune", OUT / layout, healed, *data, "--overwrite")

models = [DENSE, *(OUT / f"{layout}{state}" for layout in LAYOUTS for state in ("", "-healed"))]
scores = json.loads(hysparse("eval", *models, "--json", quiet=True))["checkpoints"]
against = [word for model in models[1:] for word in ("--against", model)]
rows = json.loads(hysparse("bench", DENSE, *against, "--json", quiet=True))["rows"]
held = {row["checkpoint"]: row["allocated_kv_bytes"] for row in rows}
table = Table(title="Recall from the context", title_justify="left")
for heading in ("", *(f"{cell['tokens']} tokens" for cell in scores[0]["retrieval"]), "KV bytes"):
    table.add_column(heading, justify="right" if heading else "left")
for model, score in zip(models, scores, strict=True):
    recall = [f"{cell['correct'] / cell['questions']:.0%}" for cell in score["retrieval"]]
    table.add_row(model.name, *recall, f"{held[str(model)]:,}")
console.print(table)

hysparse("inspect-topk", OUT / "hysparse-healed", "--prompt", texts[0])
facts, _, question = texts[1].rpartition(":")
hysparse("generate", OUT / "hysparse-healed", "--prompt", f"{facts}:", "--max-new-tokens", "1")
print(f"Expected:{question}")
