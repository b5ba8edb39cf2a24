"""``hysparse finetune``: also what each process of a launched run calls."""

import sys
from typing import Annotated

import typer

from hysparse_cli import processes
from hysparse_cli.cli.shared import (
    DATA,
    AlreadySaid,
    AsJson,
    Assignments,
    Checkpoint,
    Device,
    Dtype,
    Out,
    Overwrite,
    RecipeFile,
    SkipBadRows,
    TrustRemoteCode,
    given,
    say,
    show,
    warn,
)
from hysparse_cli.printable import printable
from hysparse_cli.progress import training


def finetune(
    checkpoint: Checkpoint,
    out: Out,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    data: Annotated[
        str | None,
        typer.Option(help=f"{DATA}, or hub:NAME, a data set.", parser=given),
    ] = None,
    skip_bad_rows: SkipBadRows = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="A dense checkpoint to distill from.  [default: none]", parser=given),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="With stages: of all together.  [default: 200]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="[default: 8]")] = None,
    sequence_tokens: Annotated[int | None, typer.Option(help="[default: 1024]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: 3e-4]")] = None,
    trainable: Annotated[
        str | None, typer.Option(help="all, attention, sparse-attention or new.  [default: all]")
    ] = None,
    save_every_steps: Annotated[
        str | None,
        typer.Option(help="Keep the run's state in OUT.state; or off.  [default: each tenth]"),
    ] = None,
    keep_state: Annotated[
        bool | None,
        typer.Option("--keep-state", help="Leave the last state, to add steps to a finished run."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="auto: go on where OUT.state has state; or the folder of a state.", parser=given
        ),
    ] = None,
    nproc_per_node: Annotated[
        int | None, typer.Option(help="Start so many processes, one for each GPU.  [default: 1]")
    ] = None,
    log_to: Annotated[str | None, typer.Option(help="tensorboard or wandb.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: Overwrite = None,
    as_json: AsJson = False,
) -> None:
    """Train a checkpoint on text, alone or towards a teacher."""
    from hysparse_cli.recipe import FinetuneOptions, load_section

    options = load_section(FinetuneOptions, recipe, assignments, locals())
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
