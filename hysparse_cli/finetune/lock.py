"""Locks OUT.state, so that one run at a time writes an output; the lock ends with its owner.

The folder is there while a run is, and goes with it where no state is in it.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hysparse_cli.errors import InvalidRecipe, writes
from hysparse_cli.printable import printable

LOCK = "lock"
_HELD = {errno.EACCES, errno.EAGAIN}


@contextmanager
def locked(folder: Path, on_note: Callable[[str], None]) -> Iterator[None]:
    """Hold ``folder``, made where there is none, for this process only.

    Raises: InvalidRecipe where another run holds it; OutOfResources where it can't be written.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    with writes(folder):
        handle = _taken(folder, on_note)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(handle)
        for path in (folder, *made):
            with suppress(OSError):  # something is in it
                path.rmdir()


def _taken(folder: Path, on_note: Callable[[str], None]) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # its owner ends and has removed the folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                owner = printable(os.read(handle, 200).decode(errors="replace").strip())
                os.close(handle)
                raise InvalidRecipe(
                    f"another run is writing this output ({owner or 'its lock is held'}): "
                    f"{folder}; wait for it, or give another OUT"
                ) from None
            on_note(f"{folder} can't be locked ({error.strerror}): start no second run there")
        if _is_there(handle, folder / LOCK):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return handle
        os.close(handle)  # of an owner that ended meanwhile and has removed it


def _is_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
