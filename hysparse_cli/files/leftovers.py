"""Finds what lies beside an output, being written or set aside, and tidies up what nobody owns.

``OUT.partial-HOST-PID`` is written until it is whole; ``OUT.replaced-HOST-PID`` was ``OUT`` a
moment ago. Its owner holds a lock on it, which ends with the process: what nobody holds was left by
a run that was killed. Neither locks nor process ids say anything of another host: its own stay.
"""

import errno
import fcntl
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from hysparse_cli.files.replaceable import foreign_in, is_checkpoint

PARTIAL, REPLACED = "partial", "replaced"
HOST = re.sub(r"[^A-Za-z0-9.]+", "_", platform.node())[:64] or "unknown"
_TRIES, _PAUSE_SECONDS = 50, 0.01


@dataclass(frozen=True)
class Left:
    """Something beside an output; ``host`` is empty in what older versions left."""

    path: Path
    kind: str
    host: str
    pid: int


def beside(place: Path, kind: str) -> Path:
    """What this process calls its own of ``kind``."""
    return place.with_name(f"{place.name}.{kind}-{HOST}-{os.getpid()}")


def claim(path: Path, make: Callable[[Path], None]) -> int:
    """Make ``path`` and hold it; returns the descriptor that holds it until it is closed.

    Raises: OSError where it can't be made.
    """
    for left in reversed(range(_TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        except FileNotFoundError:  # a run that failed has just removed the folder it had made
            if not left:
                raise
        if (handle := lock(path)) is not None:
            return handle
        time.sleep(_PAUSE_SECONDS)  # a run that tidies up was faster, and removes it
    raise FileExistsError(errno.EEXIST, "another run holds this", str(path))


def lock(path: Path, owner: int = 0) -> int | None:
    """Hold ``path``, a file or folder; None where another process does, or it is not there.

    Args:
        owner: where the file system has no locks, it is free if this process does not live.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    except OSError:
        free = owner in (0, os.getpid()) or not psutil.pid_exists(owner)
    try:
        if free and os.path.samestat(os.fstat(handle), os.lstat(path)):
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def recover(out: Path) -> None:
    """Tidy up after runs that were killed on this host: remove what they left half written, and put
    back what they had set aside."""
    place = out.absolute()
    for left in _left_beside(place):
        if left.host != HOST or (handle := lock(left.path, left.pid)) is None:
            continue
        try:
            if left.kind == PARTIAL:
                remove(left.path)
            else:
                restore(left.path, place)
        finally:
            os.close(handle)


def restore(aside: Path, place: Path) -> None:
    """Put what was set aside back where its place is free; remove it where a checkpoint has
    replaced it, unless it holds something else than a checkpoint."""
    with suppress(OSError):
        os.rename(aside, place)  # onto nothing or an empty folder, else it is refused
        return
    with suppress(OSError):  # it may not be there
        if is_checkpoint(place) and not foreign_in(aside):
            rubbish = aside.with_name(aside.name.replace(f".{REPLACED}-", f".{PARTIAL}-"))
            aside.rename(rubbish)  # half removed it would pass for what is to be put back
            remove(rubbish)


def left_alone(out: Path) -> list[str]:
    """A line on each thing that ``recover`` has not dared to remove."""
    lines = []
    for left in _left_beside(out.absolute()):
        here = left.host == HOST
        if left.kind == REPLACED:
            lines.append(
                f"{left.path} is what a run on {left.host or 'some host'} was to replace: if it is "
                "needed, give it another name, else remove it"
            )
        elif not here:
            lines.append(
                f"{left.path} was left by a run on {left.host or 'some host'}, or is being written "
                "there: remove it if no run is"
            )
    return lines


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done; no link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _left_beside(place: Path) -> list[Left]:
    name = re.compile(rf"{re.escape(place.name)}\.({PARTIAL}|{REPLACED})-(?:(.+)-)?([0-9]{{1,18}})")
    found = []
    with suppress(OSError):
        for path in sorted(place.parent.iterdir()):
            if match := name.fullmatch(path.name):
                found.append(Left(path, match[1], match[2] or "", int(match[3])))
    return found
