"""The ``hysparse`` command in a fork of the tests' process, which has imported all it needs: it
starts within milliseconds, and can be killed or interrupted as any other."""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hysparse_cli.files.shards as shards
from hysparse_cli.cli import main


@dataclass
class Forked:
    """A running command; ``said`` is the file that its stderr goes to."""

    pid: int
    said: Path

    def is_running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> tuple[int, str]:
        """Its exit code, or minus the number of the signal that ended it, and what it said."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self.said.read_text()


def start(said: Path, *args: object, write_seconds: float = 0.0) -> Forked:
    """Start ``hysparse args``.

    Args:
        write_seconds: what each write of a chunk of weights waits first.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads only wait for work
        pid = os.fork()
    if pid:
        return Forked(pid, said)
    code = 1
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = open(os.devnull, "w"), os.fdopen(2, "w")  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["hysparse", *map(str, args)]
        shards._write = _slowly(shards._write, write_seconds)
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _slowly(write: Callable[..., None], seconds: float) -> Callable[..., None]:
    def waiting(*args: object) -> None:
        time.sleep(seconds)
        write(*args)

    return waiting
