"""Retrofits of novels-25m, healed on the same tokens, beside the dense model and hybrid SWA.

    python examples/21_retrofit_study.py novels-25m healing.jsonl.xz held-out.jsonl.xz out 64,320

heals every start for 64 steps of 65,536 tokens (1% of the pretraining's), evaluates all of them on
held-out text (out/study.64.json), and does it again with 320 steps. What was healed before stays.
"""

import json
import sys
from pathlib import Path

from retrofit_starts import STARTS

from hysparse_cli.convert.measure import measured
from hysparse_cli.convert.run import execute, plan
from hysparse_cli.evaluate import evaluate
from hysparse_cli.finetune import finetune
from hysparse_cli.recipe import ConvertOptions, EvalOptions, FinetuneOptions
from hysparse_cli.source import locate

LEARNING_RATE = {"dense": 1e-4}
HEALING = {"batch_size": 4, "gradient_accumulation": 2, "sequence_tokens": 8192}
MEASURES = {"sequence_tokens": 8192, "max_tokens": 400_000, "retrieval_samples": 16}
LENGTHS = [1024, 2048, 4096, 8192]


def heal(name: str, dense: str, text: str, steps: int, start: Path, out: Path) -> str:
    options, source, teacher = STARTS[name], dense, {}
    if options is not None:
        how = ConvertOptions(**options, init="copy")
        planned = measured(plan(locate(dense), how), lambda what, done, total: None)
        execute(planned, start, lambda done, total: None)
        source, teacher = str(start), {"teacher": dense, "distill_weight": 0.5}
    rates = {"learning_rate": LEARNING_RATE.get(name, 1e-3), "decay_fraction": 0.3}
    healing = FinetuneOptions(data=text, steps=steps, **rates, **HEALING, **teacher)
    done = finetune(source, out, healing, lambda now: None)
    return f"{done.tokens_per_second:,.0f} tokens/s, {done.seconds:.0f} s"


if __name__ == "__main__":
    dense, text, held_out, folder = sys.argv[1:5]
    for steps in map(int, sys.argv[5].split(",")):
        healed = []
        for name in STARTS:
            place = Path(folder) / f"{name.replace(' ', '-')}.{steps}"
            place.mkdir(parents=True, exist_ok=True)
            if not (place / "healed").exists():
                speed = heal(name, dense, text, steps, place / "start", place / "healed")
                print(f"{name}, {steps} steps: {speed}", flush=True)
            healed.append(str(place / "healed"))
        options = EvalOptions(data=held_out, batch_size=8, retrieval_tokens=LENGTHS, **MEASURES)
        result = evaluate([dense, *healed], options).as_json()
        (Path(folder) / f"study.{steps}.json").write_text(json.dumps(result, indent=2) + "\n")
        for row in result["checkpoints"]:
            far = [cell["accuracy"] for cell in row["retrieval"] if cell["tokens"] == LENGTHS[-1]]
            print(row["checkpoint"], f"{row['loss']['nats_per_token']:.4f}", far, flush=True)
