"""Runs ``hysparse finetune``: also what each process of a launched run calls."""

import sys
from typing import TYPE_CHECKING

from hysparse_cli import processes
from hysparse_cli.cli.shared import AlreadySaid, AsJson, Checkpoint, Out, say, show, warn
from hysparse_cli.printable import printable
from hysparse_cli.progress import training

if TYPE_CHECKING:
    from hysparse_cli.recipe import FinetuneOptions


def finetune(
    checkpoint: Checkpoint, out: Out, options: "FinetuneOptions", as_json: AsJson = False
) -> None:
    """Train a checkpoint on text, alone or towards a teacher."""
    if options.nproc_per_node not in (None, 1) and not processes.is_launched():
        from hysparse_cli.finetune.launch import launch

        raise AlreadySaid(launch(sys.argv[1:], out, options))
    from hysparse_cli import finetune as finetuning
    from hysparse_cli.files.leftovers import left_alone

    if processes.rank() > 0:
        finetuning.finetune(checkpoint, out, options, lambda now: None)
        return
    warn(left_alone(out))
    with training() as told:
        result = finetuning.finetune(
            checkpoint, out, options, told.on_step, told.on_stage, on_note=_note
        )
    warn(result.bad_rows.warnings(options.data))
    show(result, as_json)


def _note(line: str) -> None:
    say(printable(line, longest=None))
