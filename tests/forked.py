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
    *("hysparse_cli.model.loading", "hysparse_cli.convert.run", "hysparse_cli.evaluate.run"),
    *("hysparse_cli.finetune.run", "hysparse_cli.bench.run", "hysparse_cli.placement.run"),
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
        sys.stderr.flush()
        os._exit(code)


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
