"""Output folders that are absent or whole: written beside their place, synced, then renamed there.

Everything goes to ``OUT.partial-<pid>``. A run that is killed leaves that folder, and the next run
with the same OUT removes it; a run that fails or is interrupted removes it itself.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError

from hysparse_cli.errors import Interrupted, InvalidRecipe, OutOfResources

PARTIAL, REPLACED = "partial", "replaced"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY}


def check_output(out: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Check that ``out`` may be written, before any work is done.

    Raises: InvalidRecipe where ``out`` holds something that may not be replaced, or overlaps one of
        ``inputs`` (folders that the command reads).
    """
    place = out.resolve()
    for folder in (path.resolve() for path in inputs):
        if place == folder:
            raise InvalidRecipe(f"OUT {out} is the input itself: give another folder")
        if place.is_relative_to(folder) or folder.is_relative_to(place):
            raise InvalidRecipe(f"OUT {out} and the input {folder} overlap: give a folder outside")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InvalidRecipe(f"OUT {out} is not a folder: give another name")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise InvalidRecipe(f"OUT {out} is not empty: give another folder, or --overwrite")
    if not (out / "config.json").is_file():
        raise InvalidRecipe(
            f"OUT {out} is not empty and holds no config.json, so it is no checkpoint and "
            "--overwrite leaves it alone: give another folder"
        )


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

    Raises: InvalidRecipe as ``check_output`` does; OutOfResources where the disk is full or ``out``
        can't be written.
    """
    recover(out)
    check_output(out, overwrite=overwrite, inputs=inputs)
    place = out.absolute()
    new_parents = [path for path in place.parents if not path.exists()]
    partial = _beside(place, PARTIAL)
    done = False
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_tree(partial)
        _replace(place, partial)
        done = True
    except OSError as error:
        if error.errno not in _NO_SPACE | _NOT_ALLOWED:
            raise
        raise _unwritable(out, error) from error
    except SafetensorError as error:
        if "os error 28" not in str(error):
            raise
        raise _unwritable(out, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
    finally:
        if not done:
            shutil.rmtree(partial, ignore_errors=True)
            for path in new_parents:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()


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
    """Write ``text`` to ``path``, which then holds all of it or what it held before."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write, moved to ``path`` where nothing is raised."""
    partial = _beside(path, PARTIAL)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def recover(out: Path) -> None:
    """Tidy up after runs that were killed: remove what they left, restore what they set aside."""
    place = out.absolute()
    if not place.parent.is_dir():
        return
    for kind in (REPLACED, PARTIAL):
        for left in place.parent.glob(f"{_escaped(place.name)}.{kind}-*"):
            owner = left.name.rpartition("-")[2]
            if not owner.isdigit() or (int(owner) != os.getpid() and psutil.pid_exists(int(owner))):
                continue
            if kind == REPLACED and not place.exists():
                left.rename(place)
            else:
                shutil.rmtree(left)


def _replace(place: Path, partial: Path) -> None:
    old = _beside(place, REPLACED)
    if place.exists() and any(place.iterdir()):
        place.rename(old)
    try:
        partial.rename(place)
    finally:
        if old.exists() and not place.exists():
            old.rename(place)
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _beside(place: Path, kind: str) -> Path:
    return place.with_name(f"{place.name}.{kind}-{os.getpid()}")


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _unwritable(out: Path, error: OSError) -> OutOfResources:
    if error.errno in _NO_SPACE:
        return OutOfResources(
            f"disk full while writing {out}: {error.strerror}; nothing was kept: free some space, "
            "or give OUT on another disk"
        )
    where = error.filename or out
    return OutOfResources(f"can't write {out}: {error.strerror or error} ({where})")
