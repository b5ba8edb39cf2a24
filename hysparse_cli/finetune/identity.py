"""Tells which run a state or a finished checkpoint belongs to, and what may change when it goes on.

A run is the content of its checkpoint, teacher and data, wherever they lie, and its options. What
may change of them, and what is then still the same:

| options | may change | why |
|---|---|---|
| data, teacher, and the checkpoint | place | the content is compared (fingerprint.py) |
| stages, steps, and what fills in a stage | by further stages | of a finished run |
| batch_size, gradient_accumulation | with the same product | the same rows; sums are rounded anew |
| processes, sequence_parallel_size, device | yes | the same rows; sums are rounded anew |
| gradient_checkpointing | yes | the same numbers, computed again |
| what is saved, logged, kept, or stops a run | yes | no step depends on it |
| everything else | no | other rows, weights or updates |
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.files.source import locate
from hysparse_cli.finetune.fingerprint import Fingerprint, of_checkpoint, of_data
from hysparse_cli.processes import world_size
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.recipe.finetune import Stage


@dataclass(frozen=True)
class Run:
    """What makes a run, of only numbers and strings.

    checkpoint, teacher, data: hashes (fingerprint.py). options: those that may not change. asked:
    the stages that the options say; stages: those that are run, ``Stage`` as dicts.
    """

    checkpoint: Fingerprint
    teacher: Fingerprint | None
    data: Fingerprint
    rows_of_step: int
    options: dict[str, Any]
    asked: list[dict[str, Any]]
    stages: list[dict[str, Any]]


SAME_NUMBERS = {
    "gradient_checkpointing",
    "keep_state",
    "log_to",
    "overwrite",
    "resume",
    "save_every_steps",
    "skip_bad_rows",
    "stop_when_rising_steps",
    "trust_remote_code",
}
SAME_WITHIN_ROUNDING = {
    "batch_size",
    "device",
    "gradient_accumulation",
    "nproc_per_node",
    "sequence_parallel_size",
}
BY_CONTENT = {"data", "teacher"}
BY_STAGE = {
    "stages",
    "steps",
    "learning_rate",
    "warmup_steps",
    "decay_fraction",
    "trainable",
    "distill_weight",
    "hidden_weight",
}
_PARTS = {
    "config": "config.json",
    "tokenizer": "tokenizer or code",
    "tensors": "tensors (their names, shapes, dtypes or files)",
    "weights": "weights",
    "format": "kind of file",
    "content": "content",
    "name": "name",
    "revision": "revision",
}


def run_of(source: Path, options: FinetuneOptions) -> Run:
    """The run that ``options`` ask for, where there was none before.

    Args:
        source: the folder of the checkpoint that is trained.
    Raises: UnreadableInput where checkpoint, teacher or data can't be read.
    """
    stages = [stage.model_dump() for stage in options.resolved_stages()]
    elsewhere = SAME_NUMBERS | SAME_WITHIN_ROUNDING | BY_CONTENT | BY_STAGE
    teacher = teacher_folder(options)
    return Run(
        checkpoint=of_checkpoint(source),
        teacher=of_checkpoint(teacher) if teacher is not None else None,
        data=of_data(options),
        rows_of_step=options.batch_size * options.gradient_accumulation,
        options=options.model_dump(mode="json", exclude=elsewhere),
        asked=stages,
        stages=stages,
    )


def teacher_folder(options: FinetuneOptions) -> Path | None:
    """Where the teacher lies, if any stage needs one."""
    needed = any(stage.needs_teacher for stage in options.resolved_stages())
    if options.teacher is None or not needed:
        return None
    return locate(options.teacher, trust_remote_code=options.trust_remote_code).folder


def places_of(source: Path, options: FinetuneOptions) -> dict[str, str]:
    """Where checkpoint, teacher and data lie."""
    teacher, data = teacher_folder(options), Path(str(options.data))
    return {
        "checkpoint": str(source.resolve()),
        **({"teacher": str(teacher.resolve())} if teacher is not None else {}),
        "data": str(data.resolve()) if data.exists() else str(options.data),
    }


def numerics_of(options: FinetuneOptions, device: torch.device) -> dict[str, Any]:
    """What the rounding of a step depends on."""
    return {
        "batch_size": options.batch_size,
        "gradient_accumulation": options.gradient_accumulation,
        "sequence_parallel_size": options.sequence_parallel_size,
        "processes": world_size(),
        "device": device.type,
        **({"threads": torch.get_num_threads()} if device.type == "cpu" else {}),
        "torch": str(torch.__version__),
    }


def differences(then: Run, now: Run) -> list[str]:
    """What makes ``now`` another run than ``then``, but for its stages, in words."""
    found = []
    for what in ("checkpoint", "teacher", "data"):
        a, b = getattr(then, what), getattr(now, what)
        if a and b:  # a further stage may be the first to need a teacher
            keys = [key for key in _PARTS if a.get(key) != b.get(key)]
            found += [f"the {what}'s {_PARTS[key]}" for key in keys]
    if then.rows_of_step != now.rows_of_step:
        rows = f"(was {then.rows_of_step}, is {now.rows_of_step})"
        found.append(f"batch_size x gradient_accumulation {rows}")
    return found + _changed(then.options, now.options)


def moved(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """A line for each thing that lies elsewhere and is the same."""
    return [
        f"the {what} was {then[what]} and is {place} now, with the same content: the same run"
        for what, place in now.items()
        if then.get(what, place) != place
    ]


def rounded(then: dict[str, Any], now: dict[str, Any], step: int) -> list[str]:
    """A line where rounding differs from here on, if it does."""
    changes = _changed(then, now)
    if not changes:
        return []
    return [
        f"the same run within rounding from step {step + 1} on, not bit for bit: "
        f"{', '.join(changes)}"
    ]


def planned(then: Run, now: Run, options: FinetuneOptions, done: int) -> list[Stage]:
    """The stages of the run ``then`` after ``done`` steps, and those that ``options`` add.

    More steps than a finished run has had, or more stages in the list, are further stages.

    Raises: InvalidRecipe where they ask for anything else.
    """
    asked, stages = then.asked, then.stages
    before = [Stage.model_construct(**stage) for stage in stages]
    if now.asked in (asked, stages):
        return before
    further = _further(asked, stages, options)
    if not further:
        changes = "; ".join(_stage_changes(asked, now.asked))
        raise InvalidRecipe(
            f"another run: {changes}; a finished run takes further stages at its end, or more "
            "steps, and nothing else"
        )
    total = sum(stage.steps for stage in before)
    if done < total:
        raise InvalidRecipe(
            f"this run is at step {done} of {total}: more steps or stages are for a finished run, "
            "so resume it as it was, with keep_state, and then add them"
        )
    if problems := [line for stage in further for line in stage.problems("the further stage: ")]:
        raise InvalidRecipe("; ".join(problems))
    return before + further


def _further(
    asked: list[dict[str, Any]], stages: list[dict[str, Any]], options: FinetuneOptions
) -> list[Stage]:
    wanted = options.resolved_stages()
    if [stage.model_dump() for stage in wanted[: len(stages)]] == stages:
        return wanted[len(stages) :]
    if options.stages and options.steps is None:
        return []
    total = sum(stage["steps"] for stage in asked)
    as_then = options.model_copy(update={"steps": total}).resolved_stages()
    more = options.total_steps - total
    if more > 0 and [stage.model_dump() for stage in as_then] == asked:
        return [options.further_stage(more)]
    return []


def _stage_changes(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    if len(then) != len(now):
        return [f"stages (were {len(then)}, are {len(now)})"]
    found = []
    for number, (a, b) in enumerate(zip(then, now, strict=True), start=1):
        of = f" of stage {number}" if len(now) > 1 else ""
        found += [
            f"{key}{of} (was {a.get(key)!r}, is {b[key]!r})" for key in b if a.get(key) != b[key]
        ]
    return found


def _changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{key} (was {then.get(key)!r}, is {now[key]!r})"
        for key in sorted(now)
        if then.get(key) != now[key]
    ]
