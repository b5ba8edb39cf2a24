"""The ``hysparse`` command: the only package that prints or exits.

A command reads its options, calls functions elsewhere and prints what they return: a table, or with
``--json`` one JSON object on stdout. Progress and messages go to stderr. torch and transformers are
imported inside the commands, so that ``--help`` answers at once.
"""

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import hysparse_cli
from hysparse_cli import processes
from hysparse_cli.cli import bench, convert, doctor, evaluate, finetune, generate, inspect_topk
from hysparse_cli.cli.options import Command
from hysparse_cli.cli.shared import LONGEST_MESSAGE, AlreadySaid, say
from hysparse_cli.errors import (
    HysparseError,
    OutOfResources,
    UnreadableInput,
    from_system,
    system_error,
)
from hysparse_cli.printable import printable, typed_line

INTERRUPTED = 130
# what libraries say where a limit of the machine or of the shell (ulimit) is reached
_LIMITS = ("can't start new thread", "failed to map segment", "cannot allocate memory")
# address space and open files
_LEAST = (
    (resource.RLIMIT_AS, 2_000_000_000, "address space (ulimit -v)"),
    (resource.RLIMIT_NOFILE, 64, "open files (ulimit -n)"),
)

COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert.convert,
    "eval": evaluate.evaluate,
    "finetune": finetune.finetune,
    "generate": generate.generate,
    "bench": bench.bench,
    "inspect-topk": inspect_topk.inspect_topk,
    "doctor": doctor.doctor,
}


class Commands(TyperGroup):
    """The commands, each made when it is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: Command(name, function) for name, function in COMMANDS.items()}


app = typer.Typer(
    name="hysparse",
    cls=Commands,
    help="Retrofit dense checkpoints into HySparse: far less KV cache and attention work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take [default: 1:3] for markup, and cut long names
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hysparse {hysparse_cli.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on any error.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line: one line and an exit code for whatever goes wrong."""
    _prepare_streams()
    processes.keep_working_directory_out()
    with _terminable() as signals:
        try:
            _check_machine()
            app()
        except HysparseError as error:
            stopped = error.exit_code == INTERRUPTED
            _fail(str(error), _stop_code(signals) if stopped else error.exit_code)
        except KeyboardInterrupt:
            _interrupted(signals)
        except MemoryError:
            _fail("out of memory", OutOfResources.exit_code)
        except (OSError, RuntimeError, ImportError) as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            _fail(str(refusal), refusal.exit_code)
        except SystemExit as stop:
            # typer turns an interrupt inside a command into this exit, without a word
            if stop.code == INTERRUPTED and not isinstance(stop, AlreadySaid):
                _interrupted(signals)
            raise
        finally:  # typer has set a hook of its own
            if "--debug" not in sys.argv:
                sys.excepthook = _report_bug


def _prepare_streams() -> None:
    """Let nothing that is printed fail for its letters, and no file take a closed stream's place,
    into which a library would then write its messages."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors=errors)


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """Let SIGTERM, as Slurm and Docker send it, and SIGHUP, of a terminal that is closed, be an
    interrupt; yields the signals received."""
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:  # nohup's choice to ignore one is kept
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_machine() -> None:
    """Refuse what libraries answer with anything from a crash to a loop without end."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UnreadableInput(
            "the working directory is no longer there: change to another"
        ) from None
    for limit, least, what in _LEAST:
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY and allowed < least:
            raise OutOfResources(
                f"this shell limits {what} to {allowed:,}: hysparse needs {least:,} or more"
            )


def _refusal(error: Exception) -> HysparseError | None:
    """What ``error`` says where it is the system's, not ours."""
    if any(words in str(error).lower() for words in _LIMITS):
        return OutOfResources(f"a limit of this machine or shell: {error}")
    refused = system_error(error)
    if refused is None:
        return None
    return from_system(refused, refused.filename or "a file", writing=False)


def _interrupted(signals: list[int]) -> NoReturn:
    _fail("interrupted; nothing half written is left", _stop_code(signals))


def _stop_code(signals: list[int]) -> int:
    return 128 + signals[0] if signals else INTERRUPTED


def _report_bug(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """What Python calls, before it exits with 1, for whatever ``main`` does not expect."""
    if processes.fails_first(exit_code=1):
        say(f"bug, please report it (traceback with --debug): {typed_line(error)}")
    _leave(1)


def _fail(message: str, exit_code: int) -> NoReturn:
    if processes.fails_first(exit_code):
        if "--debug" in sys.argv:
            import traceback

            traceback.print_exc()
        say(printable(message, LONGEST_MESSAGE))
    _leave(exit_code)
    sys.exit(exit_code)


def _leave(exit_code: int) -> None:
    """Leave at once where there are other processes, which would be waited for otherwise."""
    if processes.world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
