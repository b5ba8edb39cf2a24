"""Runs tasks of EleutherAI's lm-evaluation-harness (the package lm_eval) on a checkpoint."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.evaluate.state import file_as_it_is
from hysparse_cli.evaluate.statistics import Sample
from hysparse_cli.model.loading import Loaded
from hysparse_cli.recipe import EvalOptions

RULER_TOKENS = 4096
NO_SAMPLES = -1  # what lm_eval's RULER gives for lengths that it was not asked for


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, as lm_eval names both.

    sample: the metric by question, where its mean is the value; else None.
    """

    task: str
    metric: str
    value: float
    sample: Sample | None


class Harness:
    """lm_eval's tasks ``options.lm_eval``, the same questions for every checkpoint.

    Args:
        tokenizer: the folder of one, for which RULER's tasks make their prompts.
    Raises: InvalidRecipe where lm_eval is not installed or has no such task.
    """

    def __init__(self, options: EvalOptions, tokenizer: Path):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise InvalidRecipe(
                "eval.lm_eval needs the package lm_eval: pip install 'hysparse[lm-eval]'"
            ) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.options = options
        lengths = options.retrieval_tokens or [RULER_TOKENS]
        how = {
            "include_path": options.lm_eval_folder,
            "metadata": {"tokenizer": str(tokenizer), "max_seq_lengths": lengths},
        }
        wanted = set(options.lm_eval)
        # reading all of lm_eval's own tasks takes long: not where those of the folder are enough
        self._tasks = TaskManager(**how, include_defaults=False)
        if not wanted <= set(self._tasks.all_tasks):
            self._tasks = TaskManager(**how)
        if unknown := sorted(wanted - set(self._tasks.all_tasks)):
            raise InvalidRecipe(
                f"lm_eval has no task {', '.join(unknown)}: `lm_eval ls tasks` lists those it has"
            )

    def depends_on(self) -> dict[str, Any]:
        """What the scores depend on besides the task's name and the checkpoint."""
        from importlib.metadata import version

        folder = self.options.lm_eval_folder
        files = [] if folder is None else sorted(Path(folder).rglob("*.*"))
        return {
            "lm_eval": version("lm_eval"),
            "tokens": self.options.retrieval_tokens,
            "limit": self.options.lm_eval_limit,
            "folder": [file_as_it_is(path) for path in files],
        }

    def run(self, name: str, loaded: Loaded) -> list[TaskScore]:
        """The scores of the task, group or tag ``name``.

        Raises: UnreadableInput where its data can't be had; InvalidRecipe where it needs a package.
        """
        from datasets.exceptions import DatasetsError
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model: Any = HFLM(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            batch_size=self.options.batch_size,
        )
        try:
            results = simple_evaluate(
                model=model,
                tasks=[name],
                task_manager=self._tasks,
                limit=self.options.lm_eval_limit,
                bootstrap_iters=0,
            )
        except (DatasetsError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UnreadableInput(f"lm_eval can't read the data of {name}: {reason}") from None
        except ImportError as error:
            raise InvalidRecipe(f"lm_eval's task {name} needs another package: {error}") from None
        return scores_of(name, results)


def scores_of(name: str, results: Any) -> list[TaskScore]:
    """What ``simple_evaluate`` found for ``name``: its own metrics, or those of its members."""
    rows, scores = results["results"], []
    for task in [name] if name in rows else list(rows):
        members = _members(task, results)
        for metric, value in rows[task].items():
            if "," not in metric or "_stderr," in metric or not isinstance(value, (int, float)):
                continue
            if value != NO_SAMPLES:
                samples = [s for member in members for s in results["samples"].get(member, [])]
                scores.append(TaskScore(task, metric, value, _sample(metric, value, samples)))
    return scores


def _members(task: str, results: Any) -> list[str]:
    inside = results.get("group_subtasks", {}).get(task, [])
    return [m for member in inside for m in _members(member, results)] or [task]


def _sample(metric: str, value: float, samples: Sequence[Any]) -> Sample | None:
    name, _, wanted = metric.partition(",")
    found = [s[name] for s in samples if s["filter"] == wanted and name in s["metrics"]]
    if not found or not all(isinstance(x, (int, float)) for x in found):
        return None
    sample = Sample([float(x) for x in found], [1] * len(found))
    return sample if math.isclose(sample.mean, value, abs_tol=1e-9) else None
