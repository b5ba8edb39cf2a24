"""``hysparse bench``: a model beside its peers."""

from pathlib import Path
from typing import Annotated

import typer

from hysparse_cli.cli.shared import (
    AsJson,
    Assignments,
    Device,
    Dtype,
    RecipeFile,
    TrustRemoteCode,
    given,
    given_path,
    show,
    write,
)
from hysparse_cli.errors import InvalidRecipe, QualityGateFailed
from hysparse_cli.progress import stages

FORMATS = ("table", "json", "csv", "md")


def bench(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="A folder or hub id.", parser=given),
    ] = None,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="Instead of a checkpoint: a folder, hub id, paper-7b or paper-80b-a3b, measured "
            "with random weights.",
            parser=given,
        ),
    ] = None,
    random_weights: Annotated[
        bool | None, typer.Option("--random-weights", help="Of a checkpoint, use its config alone.")
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(help="Full to sparse layers of a dense model.  [default: 1:3]")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="One letter a layer: FSSSF...")] = None,
    last_layer_full: Annotated[
        bool | None,
        typer.Option("--last-layer-full/--no-last-layer-full", help="With --ratio."),
    ] = None,
    subjects: Annotated[
        str | None,
        typer.Option(help="Of dense, dense-cudnn, dense-flash, hybrid-swa, hysparse."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another checkpoint to measure beside; may repeat.", parser=given),
    ] = None,
    phases: Annotated[
        str | None, typer.Option(help="Of memory, prefill, decode, train.  [default: not train]")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Lengths in tokens, such as 4k,32k.  [default: 512,2k]"),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Sequences at once, such as 1,16.  [default: 1]")
    ] = None,
    decode_tokens: Annotated[
        int | None, typer.Option(help="Steps of decoding in each turn.  [default: 16]")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Turns to warm up.  [default: 1]")] = None,
    repeat: Annotated[int | None, typer.Option(help="Measured turns.  [default: 3]")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="train: compute activations twice."),
    ] = None,
    lists: Annotated[
        str | None,
        typer.Option(
            help="Blocks that sparse layers read: own, local or a file of inspect-topk.  "
            "[default: own]",
            parser=given,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A folder for JSON, CSV and plots; a sweep goes on where it stopped.",
            parser=given_path,
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = None,
    format_: Annotated[
        str, typer.Option("--format", help="What goes to stdout: table, json, csv or md.")
    ] = "table",
    as_json: AsJson = False,
) -> None:
    """Measure memory and speed of a model beside its peers.

    Memory, prefill, decode and training.
    """
    from hysparse_cli.recipe import (
        BenchOptions,
        integer_list,
        load_section,
        name_list,
        token_counts,
    )

    if format_ not in FORMATS:
        raise InvalidRecipe(f"format {format_!r} is unknown; known: {', '.join(FORMATS)}")
    if as_json and format_ not in ("table", "json"):
        raise InvalidRecipe(f"--json and --format {format_} ask for two forms: give one of them")
    flags = locals() | {"context": token_counts("context", context), "against": against or None}
    format_ = "json" if as_json else format_
    flags["batch"] = integer_list("batch", batch)
    flags |= {"phases": name_list(phases), "subjects": name_list(subjects)}
    options = load_section(BenchOptions, recipe, assignments, flags)
    from hysparse_cli.bench import run

    with stages() as advance:
        result = run.bench(checkpoint, options, advance, output)
    if format_ in ("csv", "md"):
        write(result.as_csv() if format_ == "csv" else result.markdown())
    else:
        show(result, as_json=format_ == "json")
    _fail(result.failures())


def _fail(failures: list[str]) -> None:
    if failures:
        raise QualityGateFailed("; ".join(failures))
