"""Runs calls and ``hysparse`` commands in forks of a process that has imported what they need.

``fork`` runs a call in a child of this process, which must compute nothing in other threads.
``Forks`` is a serving process that has imported every command and computes nothing; it runs
commands as it is told, by a line of JSON each. As a program this file is that server.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from hysparse_cli.cli import main

ROOT = Path(__file__).parent.parent
NETWORK = 99  # the exit code of an offline command that reached for the network
IMPORTS = (
    *("transformers.models.qwen3.modeling_qwen3", "transformers.generation.utils"),
    *("hysparse_cli.convert.decide", "hysparse_cli.convert.table", "hysparse_cli.convert.write"),
    *("hysparse_cli.evaluate.run", "hysparse_cli.finetune.run", "hysparse_cli.bench.run"),
    *("hysparse_cli.inspect_topk.run", "hysparse_cli.generate", "hysparse_cli.cli"),
    *("rich.progress", "rich.table", "rich.columns"),
)


@dataclass(frozen=True)
class Outcome:
    """``exit_code``: minus the number of the signal that ended it, where one did. ``seconds`` of
    the processor; ``peak_bytes`` of resident memory, what it inherited included."""

    exit_code: int
    seconds: float
    peak_bytes: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Child:
    """A running fork, the leader of a session; its ``stderr`` is there once it has begun."""

    pid: int
    stdout: Path
    stderr: Path

    def is_running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(
        self, patience: float = 600.0, is_enough: Callable[[], bool] = lambda: False
    ) -> Outcome:
        """Wait for its end; after ``patience`` seconds, or once it ``is_enough``, kill it and what
        it started."""
        deadline = time.monotonic() + patience
        while self.is_running():
            if time.monotonic() > deadline or is_enough():
                self.kill()
                break
            time.sleep(0.002)
        _, status, used = os.wait4(self.pid, 0)
        stdout, stderr = (
            path.read_text("utf-8", errors="replace") if path.exists() else ""
            for path in (self.stdout, self.stderr)
        )
        return Outcome(
            exit_code=os.waitstatus_to_exitcode(status),
            seconds=used.ru_utime + used.ru_stime,
            peak_bytes=used.ru_maxrss * 1024,
            stdout=stdout,
            stderr=stderr,
        )

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it may not lead its session yet
            os.killpg(self.pid, signal.SIGKILL)


def fork(call: Callable[[], object], folder: Path, stdin: str = "") -> Child:
    """Run ``call`` in a child.

    Args:
        folder: takes what it prints, in the files stdout and stderr.
        stdin: what it reads.
    """
    child = folder / "stdout", folder / "stderr"
    for path in child:
        path.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads only wait for work
        pid = os.fork()
    if not pid:
        _be_child(call, stdin, *child)
    return Child(pid, *child)


def command(
    *args: object,
    cwd: Path | None = None,
    offline: bool = False,
    kill_at_change: int = 0,
    write_seconds: float = 0.0,
) -> Callable[[], None]:
    """The call of ``hysparse args``, for a child.

    Args:
        offline: it ends with the exit code ``NETWORK`` where it reaches for the network.
        kill_at_change: it is killed at this change of the disk, counted from 1.
        write_seconds: what each write of a chunk of weights waits first.
    """

    def run() -> None:
        if cwd is not None:
            os.chdir(cwd)
        if offline:
            sys.addaudithook(no_network)
        if kill_at_change:
            sys.addaudithook(_killing_at(kill_at_change))
        if write_seconds:
            _write_slowly(write_seconds)
        sys.argv = ["hysparse", *map(str, args)]
        main()

    return run


def no_network(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook that ends the process where it looks up or connects to another host."""
    connects = event == "socket.connect" and isinstance(args[1], tuple)  # a path is no host
    if connects or event == "socket.getaddrinfo":
        os.write(2, f"reached for {args[1] if connects else args[0]}\n".encode())
        os._exit(NETWORK)


class Forks:
    """The serving process; leaving the ``with`` block ends it."""

    def __enter__(self) -> "Forks":
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
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
        cwd: Path = ROOT,
        stdin: str = "y\n",
        offline: bool = False,
        kill_at_change: int = 0,
        patience: float = 120.0,
        until: str | None = None,
    ) -> Outcome:
        """What became of ``hysparse args``; see ``command``.

        Args:
            patience: seconds after which it is killed.
            until: a pattern of files of ``cwd``: once there, it is killed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {
            "args": list(map(str, args)),
            "options": {"cwd": str(cwd), "offline": offline, "kill_at_change": kill_at_change},
            "stdin": stdin,
            "patience": patience,
            "until": until,
        }
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


def _serve() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.write(json.dumps(asdict(_served(**asked))) + "\n")
        sys.stdout.flush()


def _served(
    args: list[str], options: dict[str, Any], stdin: str, patience: float, until: str | None
) -> Outcome:
    cwd = Path(options["cwd"])
    with tempfile.TemporaryDirectory() as folder:
        child = fork(command(*args, **options), Path(folder), stdin)
        return child.end(patience, lambda: until is not None and any(cwd.glob(until)))


def _be_child(call: Callable[[], object], stdin: str, stdout: Path, stderr: Path) -> NoReturn:
    code = 1
    try:
        os.setsid()
        with tempfile.TemporaryFile() as given:
            given.write(stdin.encode())
            given.seek(0)
            os.dup2(given.fileno(), 0)
        for descriptor, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        call()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _killing_at(change: int) -> Callable[[str, tuple[Any, ...]], None]:
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        opens = event == "open" and isinstance(args[1], str) and args[1][:1] in "wax"
        if opens or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            seen += 1
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def _write_slowly(seconds: float) -> None:
    from hysparse_cli.files import shards

    write = shards._write

    def waiting(*args: Any) -> None:
        time.sleep(seconds)
        write(*args)

    shards._write = waiting


if __name__ == "__main__":
    _serve()
