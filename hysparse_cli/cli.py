"""The ``hysparse`` command: the only file that prints or exits.

A command reads its options, calls one function elsewhere and prints what that returns: a table, or
with ``--json`` one JSON object on stdout. Progress and messages go to stderr. torch and
transformers are imported inside the commands, so that ``--help`` answers at once.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hysparse_cli.errors import HysparseError, OutOfResources

app = typer.Typer(
    name="hysparse",
    help="Retrofit dense checkpoints into HySparse: far less KV cache and attention work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML recipe.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any recipe field: section.field=value.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]

INTERRUPTED = 130


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on any error.")] = False,
) -> None:
    pass


def show(result: Any, as_json: bool) -> None:
    """Print a result: its ``as_json()`` object, or its ``table()`` for people."""
    if as_json:
        sys.stdout.write(json.dumps(result.as_json(), indent=2) + "\n")
        return
    from rich.console import Console

    Console().print(result.table())


def main() -> None:
    """Run the command line: one line and an exit code for whatever goes wrong."""
    try:
        app()
    except HysparseError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing half written is left", INTERRUPTED)
    except MemoryError:
        _fail("out of memory", OutOfResources.exit_code)
    except SystemExit as stop:
        # typer turns an interrupt inside a command into this exit, without a word
        if stop.code == INTERRUPTED:
            _fail("interrupted; nothing half written is left", INTERRUPTED)
        raise
    except Exception as error:  # the one boundary: whatever arrives here is a bug
        what = " ".join(f"{type(error).__name__}: {error}".split())
        _fail(f"bug, please report it (traceback with --debug): {what}", 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exc()
    sys.stderr.write(f"hysparse: {message}\n")
    sys.exit(exit_code)
