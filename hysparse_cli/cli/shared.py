"""What the commands share: option types, and the ways to print a result or to refuse a flag."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hysparse_cli.errors import InvalidRecipe

Checkpoint = Annotated[str, typer.Argument(help="A folder or hub id, dense or converted.")]
Out = Annotated[Path, typer.Argument(help="The folder to write.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML recipe.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe field: section.field=value.")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16.  [default: as it is]")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")]
Overwrite = Annotated[bool | None, typer.Option("--overwrite", help="Replace a checkpoint in OUT.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


class AlreadySaid(SystemExit):
    """An exit for which one of the processes of the run has given the reason."""


def show(result: Any, as_json: bool) -> None:
    """Print a result: its ``as_json()`` object, or its ``table()`` for people."""
    if as_json:
        sys.stdout.write(json.dumps(result.as_json(), indent=2) + "\n")
        return
    from rich.console import Console

    Console(markup=False, emoji=False).print(result.table())  # names and errors are no markup


def warn(messages: Sequence[str]) -> None:
    for message in messages:
        sys.stderr.write(f"hysparse: warning: {message}\n")


def not_for(command: str, flags: dict[str, Any], *names: str) -> None:
    """Refuse the flags of these names, which ``command`` does not take.

    Raises: InvalidRecipe.
    """
    given = [f"--{name.replace('_', '-')}" for name in names if flags[name] is not None]
    if given:
        raise InvalidRecipe(f"{command} takes no {' and no '.join(given)}: leave that out")
