"""Begins a run: anew, from a saved state, as more of a finished run, or not at all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.files.leftovers import recover
from hysparse_cli.files.output import prepare_output
from hysparse_cli.finetune.disk import disk_need, require_disk
from hysparse_cli.finetune.identity import (
    Run,
    differences,
    moved,
    numerics_of,
    places_of,
    planned,
    rounded,
    run_of,
    teacher_folder,
)
from hysparse_cli.finetune.output import result_in
from hysparse_cli.finetune.result import FinetuneResult
from hysparse_cli.finetune.state import (
    Facts,
    read_facts,
    remove_state,
    state_to_resume,
)
from hysparse_cli.recipe import FinetuneOptions


@dataclass(frozen=True)
class Start:
    """What every process of a run must know.

    options: with the stages that will be run. run: see ``run_of``; it and ``facts`` (places,
    numerics and notes so far) go into each state. replaces: whether OUT may be replaced. said:
    lines for people, once the run can begin.
    """

    options: FinetuneOptions
    run: Run
    facts: Facts
    saved: Path | None
    replaces: bool
    said: tuple[str, ...]


def begin(
    out: Path,
    source: Path,
    options: FinetuneOptions,
    device: torch.device,
    on_note: Callable[[str], None],
) -> Start | FinetuneResult:
    """Tidy up after earlier runs and decide; the result where there is nothing left to do.

    Raises: InvalidRecipe where it may not begin, or what is there belongs to another run;
        UnreadableInput where an input or the state can't be read; OutOfResources where the disk has
        too little room.
    """
    recover(out)
    run = run_of(source, options)
    saved = state_to_resume(out, options)
    facts = read_facts(saved) if saved is not None else None
    finished = _finished(out, run, options)
    if finished is not None and run.asked in (finished.run.asked, finished.run.stages):
        if not options.keep_state:
            remove_state(out)  # there where the run was killed at the very end
        on_note(f"finished: {out} has all {len(finished.steps)} steps of this run; nothing to do")
        return finished
    if finished is not None and facts is None:
        planned(finished.run, run, options, len(finished.steps))
        raise InvalidRecipe(
            f"OUT {out} is finished, and its last state was not kept (keep_state): to train it "
            "further, finetune it into another folder"
        )
    replaces = options.overwrite or finished is not None
    prepare_output(out, overwrite=replaces, inputs=inputs_of(source, options))
    now = {"places": places_of(source, options), "numerics": numerics_of(options, device)}
    notes: list[str] = []
    if saved is None or facts is None:
        remove_state(out)
    else:
        options, run = _gone_on_with(saved, facts, run, options)
        notes = moved(facts["places"], now["places"])
        notes += rounded(facts["numerics"], now["numerics"], len(facts["history"]))
    said = (*notes, require_disk(out, disk_need(source, options), options))
    notes = [*(facts["notes"] if facts is not None else []), *notes]
    return Start(options, run, {**now, "notes": notes}, saved, replaces, said)


def inputs_of(source: Path, options: FinetuneOptions) -> list[Path]:
    """The folders that OUT must not replace."""
    teacher = teacher_folder(options)
    return [source, *([teacher] if teacher is not None else [])]


def _finished(out: Path, run: Run, options: FinetuneOptions) -> FinetuneResult | None:
    """The result in ``out``, where it is asked to go on and it is this run's.

    Raises: InvalidRecipe where it is another's.
    """
    result = result_in(out) if options.resume == "auto" else None
    if result is None or not (changes := differences(result.run, run)):
        return result
    if options.overwrite:
        return None
    raise InvalidRecipe(
        f"OUT {out} is the result of another run, with another {'; another '.join(changes)}: give "
        "another folder, or --overwrite"
    )


def _gone_on_with(
    saved: Path, facts: Facts, run: Run, options: FinetuneOptions
) -> tuple[FinetuneOptions, Run]:
    """The options and the run with the stages to run.

    Raises: InvalidRecipe where the state is another run's.
    """
    then = Run(**facts["run"])
    if changes := differences(then, run):
        raise InvalidRecipe(f"{saved} belongs to another run: {'; '.join(changes)}")
    try:
        stages = planned(then, run, options, len(facts["history"]))
    except InvalidRecipe as error:
        raise InvalidRecipe(f"{saved}: {error}") from None
    listed = [stage.as_options() for stage in stages]
    as_run = options.model_copy(update={"stages": listed, "steps": None})
    return as_run, replace(run, stages=[stage.model_dump() for stage in stages])
