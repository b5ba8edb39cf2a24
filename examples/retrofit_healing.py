"""One healing of the retrofit study, and what it is judged by."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from retrofit_starts import STARTS
from transformers import AutoConfig

from hysparse_cli.convert.decide import dense_model, measure
from hysparse_cli.convert.dense import read_dense
from hysparse_cli.convert.plan import plan
from hysparse_cli.convert.write import execute
from hysparse_cli.evaluate import evaluate
from hysparse_cli.files.source import locate
from hysparse_cli.finetune import finetune
from hysparse_cli.model.kv_cache import kv_cache_of
from hysparse_cli.recipe import ConvertOptions, EvalOptions, FinetuneOptions

ROW_TOKENS = 8192
LENGTHS = [1024, 2048, 4096, 8192]
MEASURES = {"sequence_tokens": 8192, "max_tokens": 400_000, "retrieval_samples": 16}


class Run(NamedTuple):
    """A start of retrofit_starts.py healed for ``steps`` of ``rows`` rows; ``seed`` orders them."""

    start: str
    steps: int
    rows: int
    learning_rate: float
    seed: int

    def folder(self, out: Path) -> Path:
        name = f"{self.start} {self.steps} {self.learning_rate:g} {self.seed}"
        return out / name.replace(" ", "-").replace(":", "-")


def heal(run: Run, dense: str, text: str, out: Path, teacher: str | None = None) -> dict[str, Any]:
    """Heal, unless it is done already; what the training itself shows.

    ``teacher`` is one to follow to the end; without it a start is taught by ``dense`` for a while.
    """
    folder, options = run.folder(out), STARTS[run.start].options
    if (folder / "run.json").exists():
        return json.loads((folder / "run.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    source, stages, taught_by = dense, alone(run), None
    if options is not None:
        source, taught_by = str(folder / "start"), teacher or dense
        stages = taught(run) if teacher else taught_first(run)
        checkpoint, choices = locate(dense), ConvertOptions(**options, init="copy")
        planned = plan(read_dense(checkpoint), choices)
        planned = measure(planned, dense_model(checkpoint, choices), quiet)
        execute(planned, folder / "start", quiet)
    healing = FinetuneOptions(
        data=text,
        stages=stages,
        teacher=taught_by,
        learning_rate=run.learning_rate,
        batch_size=run.rows,
        sequence_tokens=ROW_TOKENS,
        seed=run.seed,
    )
    done = finetune(source, folder / "healed", healing, quiet)
    last = [step.losses["next_token_loss"] for step in done.steps[-run.steps // 8 :]]
    result = run._asdict() | {
        "tokens": run.steps * run.rows * ROW_TOKENS,
        "training_loss": sum(last) / len(last),
        "tokens_per_second": done.tokens_per_second,
    }
    (folder / "run.json").write_text(json.dumps(result) + "\n")
    print(f"{folder.name}: {done.tokens_per_second:,.0f} tokens/s", flush=True)
    return result


# Everywhere the learning rate warms up for a tenth of the steps and falls over the last quarter.


def alone(run: Run) -> list[dict[str, Any]]:
    """Next-token loss."""
    warmup = run.steps // 10
    return [stage("train", run.steps, warmup_steps=warmup, decay_fraction=0.25)]


def taught(run: Run) -> list[dict[str, Any]]:
    """Distillation."""
    warmup = run.steps // 10
    return [stage("distill", run.steps, warmup_steps=warmup, decay_fraction=0.25)]


def taught_first(run: Run) -> list[dict[str, Any]]:
    """Distillation and next-token loss, half each, and in the last quarter the latter alone."""
    warmup, end = run.steps // 10, run.steps // 4
    both = {"distill_weight": 0.5, "warmup_steps": warmup, "decay_fraction": 0.0}
    last = stage("train", end, warmup_steps=0, decay_fraction=1.0)
    return [stage("distill", run.steps - end, **both), last]


def stage(objective: str, steps: int, **options: Any) -> dict[str, Any]:
    return {"objective": objective, "steps": steps} | options


def judge(checkpoints: list[str], held_out: str) -> list[dict[str, Any]]:
    """Loss, by position too, retrieval by form and length, and KV bytes at 8k of each."""
    options = EvalOptions(data=held_out, batch_size=8, retrieval_tokens=LENGTHS, **MEASURES)
    found = []
    for row in evaluate(checkpoints, options).as_json()["checkpoints"]:
        config = AutoConfig.from_pretrained(row["checkpoint"], trust_remote_code=False)
        cells = [[cell["form"], cell["tokens"], cell["accuracy"]] for cell in row["retrieval"]]
        found.append(
            {
                "loss": row["loss"]["nats_per_token"],
                "loss_by_position": row["loss"]["by_position"],
                "retrieval": cells,
                "kv_bytes": kv_cache_of(config).total_bytes(ROW_TOKENS, 2),
            }
        )
    return found


def quiet(*progress: Any) -> None:
    pass
