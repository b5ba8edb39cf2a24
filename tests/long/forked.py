"""One command in a forked child of a process that has imported torch and transformers once.

A case costs the command alone, not seconds of imports; what it took and printed is measured.
"""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MOST_SECONDS = 10
MOST_BYTES = 1 << 30
_PATIENCE = 60
_ADDRESS_BYTES = 8 << 30  # so that a bomb does not take the machine with it
NETWORK = 99  # the exit code of a child that reached for the network


@dataclass(frozen=True)
class Outcome:
    """What became of a child. ``seconds`` of processor time; ``peak_bytes`` of resident memory,
    what it inherited included. One that does not end is killed."""

    exit_code: int
    killed_by: int
    seconds: float
    peak_bytes: int
    stdout: str
    stderr: str


def forked(call: Callable[[], object], scratch: Path) -> Outcome:
    """Run ``call`` in a child, for at most ``_PATIENCE`` seconds, however busy the machine is.

    Args:
        scratch: a folder that takes what the child prints.
    """
    paths = [scratch / name for name in ("stdout", "stderr")]
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_child(call, paths)
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - begin > _PATIENCE:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.005)
    return Outcome(
        exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1,
        killed_by=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        stdout=paths[0].read_text(encoding="utf-8", errors="replace"),
        stderr=paths[1].read_text(encoding="utf-8", errors="replace"),
    )


def _be_child(call: Callable[[], object], paths: list[Path]) -> None:
    code = 1
    try:
        for descriptor, path in enumerate(paths, start=1):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limit = _address_bytes() + _ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.addaudithook(_no_network)
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


def _no_network(event: str, args: object) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        os._exit(NETWORK)


def _address_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")
