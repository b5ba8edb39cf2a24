"""Holds what ``hysparse eval`` found, and gives it as JSON, with differences to the first."""

from dataclasses import dataclass
from statistics import mean
from typing import Any

from hysparse_cli.evaluate.harness import TaskScore
from hysparse_cli.evaluate.perplexity import Loss
from hysparse_cli.evaluate.requirements import Verdict, length_name
from hysparse_cli.evaluate.retrieval import Retrieval
from hysparse_cli.evaluate.statistics import Difference, Sample, difference, finite
from hysparse_cli.model.loading import short_names
from hysparse_cli.recipe import EvalOptions
from hysparse_cli.texts.documents import BadRows

SCHEMA = "hysparse.eval/2"


@dataclass(frozen=True)
class CheckpointScores:
    """One checkpoint's results; ``attention`` says what it is, such as ``hysparse FSSSF``."""

    checkpoint: str
    attention: str
    dtype: str
    loss: Loss | None
    retrieval: list[Retrieval]
    tasks: list[TaskScore]

    def metrics(self) -> dict[str, float]:
        """What a requirement may name: see ``metric_names``."""
        found: dict[str, float] = {}
        if self.loss is not None:
            found |= {"loss": self.loss.nats_per_token, "perplexity": self.loss.perplexity}
        cells: dict[str, list[float]] = {}
        for cell in self.retrieval:
            for name in _retrieval_names(cell.form, cell.tokens):
                cells.setdefault(name, []).append(cell.accuracy)
        found |= {name: mean(values) for name, values in cells.items()}
        for score in self.tasks:
            found.setdefault(score.task, score.value)
        return found


def metric_names(options: EvalOptions) -> list[str]:
    """The metrics that ``options`` measure.

    ``loss``, ``perplexity``; ``retrieval`` and each form, the mean over lengths or, as in
    ``recall@8k``, at one; each task of lm_eval, by its first metric.
    """
    names = ["loss", "perplexity"] if options.data is not None else []
    for form in options.retrieval_forms:
        for tokens in options.retrieval_tokens:
            names += _retrieval_names(form, tokens)
    return list(dict.fromkeys([*names, *options.lm_eval]))


def _retrieval_names(form: str, tokens: int) -> list[str]:
    length = length_name(tokens)
    return ["retrieval", f"retrieval@{length}", form, f"{form}@{length}"]


@dataclass(frozen=True)
class Evaluation:
    """What ``hysparse eval`` found; the differences are to the first of ``scores``.

    ``bad_rows``: those of the data that were skipped.
    """

    options: EvalOptions
    environment: dict[str, Any]
    scores: list[CheckpointScores]
    verdicts: list[Verdict]
    bad_rows: BadRows

    @property
    def names(self) -> list[str]:
        """What to call the checkpoints."""
        return short_names([score.checkpoint for score in self.scores])

    def failures(self) -> list[str]:
        """What each requirement that does not hold says, and of which checkpoint."""
        return [
            f"{verdict.requirement.text}: {self.names[verdict.place]} has {verdict.value:.6g}, the "
            f"bound is {verdict.bound:.6g}"
            for verdict in self.verdicts
            if not verdict.holds
        ]

    def as_json(self) -> dict[str, Any]:
        first = self.scores[0]
        return {
            "schema": SCHEMA,
            "options": self.options.model_dump(mode="json"),
            "environment": self.environment,
            "skipped_rows": self.bad_rows.as_json(),
            "checkpoints": [
                _score_as_json(score, None if score is first else first) for score in self.scores
            ],
            "gates": [
                {
                    "require": verdict.requirement.text,
                    "checkpoint": self.scores[verdict.place].checkpoint,
                    "value": finite(verdict.value),
                    "bound": finite(verdict.bound),
                    "holds": verdict.holds,
                }
                for verdict in self.verdicts
            ],
        }


def _score_as_json(score: CheckpointScores, first: CheckpointScores | None) -> dict[str, Any]:
    """``first`` is what the differences are to; None for the first itself."""
    before = {(cell.form, cell.tokens): cell.sample for cell in first.retrieval} if first else {}
    tasks = {(task.task, task.metric): task for task in first.tasks} if first else {}
    return {
        "checkpoint": score.checkpoint,
        "attention": score.attention,
        "dtype": score.dtype,
        "loss": score.loss and _loss_as_json(score.loss, first.loss if first else None),
        "retrieval": [
            {
                "form": cell.form,
                "tokens": cell.tokens,
                "correct": int(cell.sample.total),
                "questions": cell.sample.count,
                "accuracy": cell.accuracy,
                "difference": _difference(cell.sample, before.get((cell.form, cell.tokens))),
            }
            for cell in score.retrieval
        ],
        "tasks": [
            {
                "task": task.task,
                "metric": task.metric,
                "value": finite(task.value),
                "difference": _maybe(task_difference(task, tasks.get((task.task, task.metric)))),
            }
            for task in score.tasks
        ],
    }


def _loss_as_json(loss: Loss, first: Loss | None) -> dict[str, Any]:
    return {
        "nats_per_token": finite(loss.nats_per_token),
        "perplexity": finite(loss.perplexity),
        "by_position": [finite(nats) for nats in loss.by_position],
        "tokens": loss.tokens,
        "windows": len(loss.windows.counts),
        "difference": _difference(loss.windows, None if first is None else first.windows),
        "by_position_difference": None
        if first is None
        else [_difference(a, b) for a, b in zip(loss.parts, first.parts, strict=True)],
    }


def task_difference(task: TaskScore | None, first: TaskScore | None) -> Difference | None:
    """How far ``task`` is above the first checkpoint's; None where either is missing."""
    if task is None or first is None:
        return None
    if task.sample is None or first.sample is None:
        return Difference(task.value - first.value, None)
    return difference(task.sample, first.sample)


def _difference(sample: Sample, first: Sample | None) -> dict[str, float | None] | None:
    return None if first is None else difference(sample, first).as_json()


def _maybe(found: Difference | None) -> dict[str, float | None] | None:
    return None if found is None else found.as_json()
