"""Holds what the commands share: types of arguments, and the ways to print a result."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from hysparse_cli.errors import from_system
from hysparse_cli.files.paths import check_given, expanded
from hysparse_cli.printable import cells, printable

LONGEST_MESSAGE = 4000  # a recipe's errors are reported all at once


def usage(read: Callable[[str], object]) -> Callable[[str], str]:
    """A parser of text that lets what ``read`` refuses, with a ValueError, be wrong usage."""

    def checked(text: str) -> str:
        try:
            read(text)
        except ValueError as error:
            raise typer.BadParameter(f"{printable(repr(text))}: {error}") from None
        return text

    return checked


given = usage(check_given)  # reads every argument that names a model or a file


def given_path(text: str) -> Path:
    """Read an argument or option that is a path; ``~`` is the user's home.

    Raises: typer.BadParameter where there can be no such path.
    """
    return Path(expanded(given(text)))


Checkpoint = Annotated[
    str, typer.Argument(help="A folder or hub id, dense or converted.", parser=given)
]
Out = Annotated[Path, typer.Argument(help="The folder to write.", parser=given_path)]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML recipe.", parser=given_path)
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe field: section.field=value.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


class AlreadySaid(SystemExit):
    """An exit for which the reason was given, or needs no word."""


def show(result: Any, as_json: bool) -> None:
    """Print a result: its ``as_json()`` object, or its ``table()`` for people."""
    if as_json:
        write(json.dumps(result.as_json(), indent=2) + "\n")
        return
    from rich.console import Console
    from rich.segment import Segment, Segments

    console = Console(markup=False, emoji=False)  # names and errors are no markup
    segments = console.render(result.table())
    drawn = [Segment(cells(text), style, control) for text, style, control in segments]
    with console.capture() as capture:
        console.print(Segments(drawn))
    write(capture.get())


def write(text: str) -> None:
    """Print to stdout at once.

    Raises: OutOfResources where it can't be written; AlreadySaid where nobody reads it.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # what is still buffered must not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise AlreadySaid(128 + signal.SIGPIPE) from None
        raise from_system(error, "stdout", writing=True) from error


def say(message: str) -> None:
    """Print a line to stderr, if it can be."""
    with suppress(OSError):
        sys.stderr.write(f"hysparse: {message}\n")


def warn(messages: Sequence[str]) -> None:
    for message in messages:
        say(f"warning: {printable(message, LONGEST_MESSAGE)}")


def hint(checkpoints: Sequence[str]) -> None:
    """Say which of ``checkpoints`` need healing."""
    from hysparse_cli.files.healed import hints

    for line in hints(checkpoints):
        say(line)
