"""Runs ``hysparse bench``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hysparse_cli.cli.shared import AsJson, given, given_path, show, write
from hysparse_cli.errors import InvalidRecipe, QualityGateFailed
from hysparse_cli.progress import stages

if TYPE_CHECKING:
    from hysparse_cli.recipe import BenchOptions

FORMATS = ("table", "json", "csv", "md")


def bench(
    options: "BenchOptions",
    checkpoint: Annotated[
        str | None, typer.Argument(help="A folder or hub id.", parser=given)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A folder for JSON, CSV and plots; a sweep goes on where it stopped.",
            parser=given_path,
        ),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="What goes to stdout: table, json, csv or md.")
    ] = "table",
    as_json: AsJson = False,
) -> None:
    """Measure memory and speed of a model beside its peers.

    Memory, prefill, decode and training.
    """
    if format_ not in FORMATS:
        raise InvalidRecipe(f"format {format_!r} is unknown; known: {', '.join(FORMATS)}")
    if as_json and format_ not in ("table", "json"):
        raise InvalidRecipe(f"--json and --format {format_} ask for two forms: give one of them")
    from hysparse_cli.bench import run

    with stages() as advance:
        result = run.bench(checkpoint, options, advance, output)
    if format_ in ("csv", "md"):
        write(result.as_csv() if format_ == "csv" else result.markdown())
    else:
        show(result, as_json=as_json or format_ == "json")
    if failures := result.failures():
        raise QualityGateFailed("; ".join(failures))
