<<<<<<< HEAD
"""Many runs of the ``hysparse`` command, each in a fork of a process that has imported it all.

Run as a program it serves: a run as a line of JSON in, its exit code and output out. Whoever wants
to know whether a run reached for the network gives ``network``, a file that is then written.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IMPORTS = (
    *("transformers.models.qwen3.modeling_qwen3", "transformers.generation.utils"),
    *("hysparse_cli.loading", "hysparse_cli.convert.run", "hysparse_cli.evaluate.run"),
    *("hysparse_cli.finetune.run", "hysparse_cli.bench.run", "hysparse_cli.selection.run"),
    *("hysparse_cli.inspect_topk.run", "hysparse_cli.generate", "hysparse_cli.cli"),
    *("rich.progress", "rich.table", "rich.columns"),
)


class Forks:
    """The serving process; leaving the ``with`` block ends it."""

    def __enter__(self) -> "Forks":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(
        self,
        args: Sequence[object],
        *,
        cwd: Path,
        network: Path,
        stdin: str = "y\n",
        until: str | None = None,
    ) -> tuple[int, str, float]:
        """Exit code (124 after two minutes), output and seconds of the processor.

        Args:
            until: a pattern of files of ``cwd``: once there, the run is killed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"args": list(map(str, args)), "cwd": str(cwd), "stdin": stdin, "until": until}
        self._process.stdin.write(json.dumps(asked | {"network": str(network)}) + "\n")
        self._process.stdin.flush()
        code, output, seconds = json.loads(self._process.stdout.readline())
        return code, output, seconds


def _serve() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(json.loads(line))) + "\n")
        sys.stdout.flush()


def _run(asked: dict[str, Any]) -> tuple[int, str, float]:
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as output:
        given.write(asked["stdin"])
        given.flush()
        given.seek(0)
        if not (child := os.fork()):
            for descriptor, file in enumerate((given, output, output)):
                os.dup2(file.fileno(), descriptor)
            _command(asked)
        code, seconds = _wait(child, asked)
        output.seek(0)
        return code, output.read(), seconds


def _command(asked: dict[str, Any]) -> None:
    from hysparse_cli.cli import main

    os.setsid()
    os.chdir(asked["cwd"])
    sys.stdin = os.fdopen(0)
    sys.argv = ["hysparse", *asked["args"]]
    reached = asked["network"]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            Path(reached).write_text(str(args[0]))

    sys.addaudithook(watch)
    code = 1
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
=======
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

import hysparse_cli.convert.shards as shards
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
>>>>>>> staging
        sys.stderr.flush()
        os._exit(code)


<<<<<<< HEAD
def _wait(child: int, asked: dict[str, Any]) -> tuple[int, float]:
    """Exit code and seconds of the processor."""
    until, folder, end = asked["until"], Path(asked["cwd"]), time.monotonic() + 120
    while time.monotonic() < end and not (until and any(folder.glob(until))):
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        time.sleep(0.01)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return 124, 0.0


if __name__ == "__main__":
    _serve()
=======
def _slowly(write: Callable[..., None], seconds: float) -> Callable[..., None]:
    def waiting(*args: object) -> None:
        time.sleep(seconds)
        write(*args)

    return waiting
>>>>>>> staging
