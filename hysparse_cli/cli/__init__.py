"""The ``hysparse`` command: the only package that prints or exits.

A command reads its options, calls functions elsewhere and prints what they return: a table, or with
``--json`` one JSON object on stdout. Progress and messages go to stderr. torch and transformers are
imported inside the commands, so that ``--help`` answers at once.
"""

import os
import sys
from typing import Annotated, NoReturn

import typer

from hysparse_cli import processes
from hysparse_cli.cli import bench, convert, evaluate, finetune, generate, inspect_topk
from hysparse_cli.cli.shared import AlreadySaid
from hysparse_cli.errors import HysparseError, OutOfResources

INTERRUPTED = 130

app = typer.Typer(
    name="hysparse",
    help="Retrofit dense checkpoints into HySparse: far less KV cache and attention work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take [default: 1:3] for markup, and cut long names
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(convert.convert)
app.command("eval")(evaluate.evaluate)
app.command()(finetune.finetune)
app.command()(generate.generate)
app.command()(bench.bench)
app.command("inspect-topk")(inspect_topk.inspect_topk)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on any error.")] = False,
) -> None:
    pass


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
        if stop.code == INTERRUPTED and not isinstance(stop, AlreadySaid):
            _fail("interrupted; nothing half written is left", INTERRUPTED)
        raise
    finally:  # typer has set a hook of its own
        if "--debug" not in sys.argv:
            sys.excepthook = _report_bug


def _report_bug(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """What Python calls, before it exits with 1, for whatever ``main`` does not expect."""
    if processes.fails_first(exit_code=1):
        what = " ".join(f"{kind.__name__}: {error}".split())
        sys.stderr.write(f"hysparse: bug, please report it (traceback with --debug): {what}\n")
    _leave(1)


def _fail(message: str, exit_code: int) -> NoReturn:
    if processes.fails_first(exit_code):
        if "--debug" in sys.argv:
            import traceback

            traceback.print_exc()
        sys.stderr.write(f"hysparse: {message}\n")
    _leave(exit_code)
    sys.exit(exit_code)


def _leave(exit_code: int) -> None:
    """Leave at once where there are other processes, which would be waited for otherwise."""
    if processes.world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
