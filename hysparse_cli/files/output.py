"""Writes outputs that are absent or whole: beside their place, synced, then renamed there.

Everything goes to ``OUT.partial-HOST-PID``. A run that is killed leaves that, and the next run with
the same OUT removes it (see leftovers.py); a run that fails or is interrupted removes it itself.
What appeared at OUT meanwhile is never replaced.
"""

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hysparse_cli.errors import (
    HysparseError,
    Interrupted,
    InvalidRecipe,
    OutOfResources,
    writes,
)
from hysparse_cli.files.leftovers import (
    PARTIAL,
    REPLACED,
    beside,
    claim,
    lock,
    recover,
    remove,
    restore,
)
from hysparse_cli.files.reading import read_json
from hysparse_cli.files.replaceable import (
    FILES_NAME,
    check_output,
    check_replaceable,
    files_to_note,
)
from hysparse_cli.printable import printable
from hysparse_cli.units import format_bytes

_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def prepare_output(out: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Tidy up after runs that were killed, and check that ``out`` can be written, before any work.

    Raises: InvalidRecipe as ``check_output`` does; OutOfResources where ``out`` can't be written.
    """
    recover(out)
    check_output(out, overwrite=overwrite, inputs=inputs)
    place = out.absolute()
    with writes(printable(out), _places(place)), _claimed(place, Path.mkdir):
        pass


def prepare_file(path: Path) -> None:
    """As ``prepare_output``, for a file.

    Raises: OutOfResources.
    """
    with writes(printable(path)):
        recover(path)
        with _claimed(path.absolute(), _new_file):
            pass


def prepare_results(folder: Path, result: str, schema: str, others: Sequence[str] = ()) -> None:
    """Make ``folder``, and check that results can be written to it before any work is done.

    It may hold other things, but nothing by the names of results.

    Args:
        result: the name of the JSON file that is written first of all. schema: how its ``schema``
            begins: what has it was written by the same command and may be replaced.
        others: patterns of the names of what is written after it.
    Raises: InvalidRecipe where ``folder`` is a file, or something else has one of these names;
        OutOfResources where it can't be written.
    """
    name = printable(folder)
    with writes(name):
        if folder.exists() and not folder.is_dir():
            raise InvalidRecipe(f"output {name} is a file: give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        there = (folder / result).exists()
        strangers = [path for pattern in others for path in folder.glob(pattern)]
    if there and not _has_schema(folder / result, schema):
        strangers.insert(0, folder / result)
    elif there:
        strangers = []
    if strangers:
        raise InvalidRecipe(
            f"{printable(strangers[0])} is not what this command wrote, and would be replaced: "
            "give another --output, or move that file away"
        )
    prepare_file(folder / result)


def require_free_space(out: Path, needed: int) -> None:
    """Raises: OutOfResources where the disk that will hold ``out`` has not ``needed`` bytes."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutOfResources(
            f"disk full: {out} needs {format_bytes(needed)} and {existing} has "
            f"{format_bytes(free)} free: free some, or give OUT on another disk"
        )


@contextmanager
def staged(out: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when the block ends well and is removed otherwise.

    Raises: InvalidRecipe as ``check_output`` does, at the beginning or at the end; OutOfResources
        where the disk is full or ``out`` can't be written.
    """
    recover(out)
    check_output(out, overwrite=overwrite, inputs=inputs)
    place = out.absolute()
    with writes(printable(out), _places(place)), _claimed(place, Path.mkdir) as partial:
        yield partial
        if (note := files_to_note(partial)) is not None:
            (partial / FILES_NAME).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        sync_tree(partial)
        with _deferred():
            if overwrite and place.is_dir() and any(place.iterdir()):
                _replace(out, partial, inputs)
            else:
                _put(out, partial)
            with suppress(OSError):  # a folder may be closed to reading
                sync(place.parent)


def sync_tree(folder: Path) -> None:
    """Flush every file under ``folder``, and the folders themselves, to the disk."""
    for root, _, names in os.walk(folder):
        for path in (*(Path(root, name) for name in names), Path(root)):
            sync(path)


@contextmanager
def keeping(kept: Path | None) -> Iterator[None]:
    """Let an interrupt say that ``kept`` has what is finished, and that it can go on from there.

    Raises: Interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        if kept is None:
            raise
        raise Interrupted(
            f"interrupted; what is finished is kept in {kept}: the same command goes on from there"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, which then holds all of it or what it held before.

    Raises: OutOfResources where it can't be written.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, moved to ``path`` where nothing is raised.

    Raises: OutOfResources where it can't be written.
    """
    with writes(printable(path)):
        recover(path)
        with _claimed(path.absolute(), _new_file) as partial:
            yield partial
            sync(partial)
            partial.replace(path)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(out: Path, partial: Path) -> None:
    """Give ``partial`` the name ``out``, if that is free: of two runs the first has it."""
    try:
        os.rename(partial, out)  # an empty folder gives way; anything else is an error
    except OSError as error:
        if error.errno not in _TAKEN or not os.path.lexists(out):
            raise
        raise InvalidRecipe(
            f"OUT {printable(out)} appeared while this ran, and is left as it is: give another "
            "folder, or --overwrite"
        ) from None


def _replace(out: Path, partial: Path, inputs: Sequence[Path]) -> None:
    """Put ``partial`` in the place of ``out``, which is judged once more before it goes."""
    name, old = printable(out), beside(out.absolute(), REPLACED)
    check_output(out, overwrite=True, inputs=inputs)
    handle = lock(out)
    if handle is None:
        raise InvalidRecipe(f"OUT {name} is being replaced by another run: give another folder")
    try:
        os.rename(out, old)
        check_replaceable(old, name)  # nothing can be put into it by its name any more
        _put(out, partial)
    except InvalidRecipe as error:
        restore(old, out.absolute())
        kept = f"; what it held before is kept in {printable(old)}" if old.exists() else ""
        raise InvalidRecipe(f"{error}{kept}") from None
    finally:
        restore(old, out.absolute())
        os.close(handle)


@contextmanager
def _claimed(place: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """What lies beside ``place`` to be filled; what is left of it at the end is removed, and so are
    the folders that were made for it, if they are empty."""
    new_parents = [path for path in place.parents if not path.exists()]
    partial, handle = beside(place, PARTIAL), None
    try:
        handle = claim(partial, make)
        yield partial
    finally:
        if handle is not None:
            remove(partial)
            os.close(handle)
        for path in new_parents:
            with suppress(OSError):
                path.rmdir()


def _new_file(path: Path) -> None:
    path.open("x").close()


def _places(place: Path) -> tuple[Path, ...]:
    return place, beside(place, PARTIAL), beside(place, REPLACED)


def _has_schema(path: Path, schema: str) -> bool:
    try:
        content = read_json(path)
    except HysparseError:
        return False
    return isinstance(content, dict) and str(content.get("schema")).startswith(schema)


@contextmanager
def _deferred() -> Iterator[None]:
    """Let signals that would end this process wait until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread alone
        return
    received: list[int] = []
    heard = [number for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
