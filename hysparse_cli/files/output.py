"""Outputs that are absent or whole: written beside their place, synced, then renamed there.

Everything goes to ``OUT.partial-HOST-PID``. A run that is killed leaves that, and the next run with
the same OUT removes it (see leftovers.py); a run that fails or is interrupted removes it itself.
What appeared at OUT meanwhile is never replaced.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hysparse_cli.errors import (
    HysparseError,
    Interrupted,
    InvalidRecipe,
    OutOfResources,
    from_system,
    system_error,
    writes,
)
from hysparse_cli.files.interrupts import deferred
from hysparse_cli.files.leftovers import (
    PARTIAL,
    REPLACED,
    beside,
    claim,
    lock,
    recover,
    remove,
    settle,
)
from hysparse_cli.files.replaceable import (
    FILES_NAME,
    check_output,
    check_replaceable,
    files_to_note,
)
from hysparse_cli.printable import printable

_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


def prepare_output(out: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Tidy up after runs that were killed, and check that ``out`` can be written, before any work.

    Raises: InvalidRecipe as ``check_output`` does; OutOfResources where ``out`` can't be written.
    """
    recover(out)
    check_output(out, overwrite=overwrite, inputs=inputs)
    place = out.absolute()
    with _of_output(out, place), _claimed(place, Path.mkdir):
        pass


def prepare_file(path: Path) -> None:
    """As ``prepare_output``, for a file.

    Raises: OutOfResources.
    """
    with writes(printable(path)):
        recover(path)
        with _claimed(path.absolute(), _new_file):
            pass


def require_free_space(out: Path, needed: int) -> None:
    """Raises: OutOfResources where the disk that will hold ``out`` has not ``needed`` bytes."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutOfResources(
            f"disk full: {out} needs {needed / 1e9:.2f} GB and {existing} has {free / 1e9:.2f} GB "
            "free: free some, or give OUT on another disk"
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
    with _of_output(out, place), _claimed(place, Path.mkdir) as partial:
        yield partial
        if (note := files_to_note(partial)) is not None:
            (partial / FILES_NAME).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        sync_tree(partial)
        with deferred():
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
        settle(old, out.absolute())
        kept = f"; what it held before is kept in {printable(old)}" if old.exists() else ""
        raise InvalidRecipe(f"{error}{kept}") from None
    finally:
        settle(old, out.absolute())
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


@contextmanager
def _of_output(out: Path, place: Path) -> Iterator[None]:
    """Let the system's refusal to write below ``place`` be an OutOfResources; that of what is read
    meanwhile is left to others.

    Raises: OutOfResources.
    """
    try:
        yield
    except HysparseError:
        raise
    except Exception as error:
        refusal = system_error(error)
        if refusal is None:
            raise
        where = refusal.filename and Path(os.fsdecode(refusal.filename))
        if where and not any(
            where.is_relative_to(x) or x.is_relative_to(where)
            for x in (place, beside(place, PARTIAL), beside(place, REPLACED))
        ):
            raise
        raise from_system(refusal, printable(out), writing=True) from error
