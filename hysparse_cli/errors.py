"""Names what can go wrong through no fault of ours, each kind with its exit code.

Raise one of these for bad input; the CLI prints its one line and exits with ``exit_code``. Anything
else that escapes is a bug: exit code 1. The message says what was wrong (with the value), where
(file, tensor, recipe field), and what to do.
"""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hysparse_cli.printable import printable, single_line

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}


class HysparseError(Exception):
    """A user-facing error; the message is one line and complete."""

    exit_code = 1


class InvalidRecipe(HysparseError):
    """A recipe, option or plan that cannot be carried out."""

    exit_code = 3


class UnsupportedModel(HysparseError):
    """A model that HySparse cannot be retrofitted into, or not yet."""

    exit_code = 4


class OutOfResources(HysparseError):
    """Not enough memory, disk or GPU."""

    exit_code = 5


class QualityGateFailed(HysparseError):
    """A measured quality is below what was required."""

    exit_code = 6


class UnreadableInput(HysparseError):
    """An input that is missing, corrupt or not what it claims to be."""

    exit_code = 7


class Interrupted(HysparseError):
    """The user stopped the command, and there is more to say than that."""

    exit_code = 130


@contextmanager
def reads(what: object) -> Iterator[None]:
    """Let the system's refusal to read ``what``, a path, be an UnreadableInput (or OutOfResources,
    where memory or open files have run out)."""
    with _refused(what, writing=False):
        yield


@contextmanager
def writes(what: object, places: Sequence[Path] = ()) -> Iterator[None]:
    """Let the system's refusal to write ``what``, a path, be an OutOfResources.

    Args:
        places: where it is written, if given: a refusal of another path, such as of an input that
            is read meanwhile, is left to others.
    """
    with _refused(what, writing=True, places=places):
        yield


def from_system(error: OSError, what: object, *, writing: bool) -> HysparseError:
    """The one place that says which exit code the system's refusal has.

    Args:
        what: the input or output. writing: whether it was being written.
    """
    reason, what = error.strerror or single_line(error), printable(what)
    if error.errno in _FULL:
        return OutOfResources(f"disk full while writing {what}: {reason}; free some space")
    named = error.filename if isinstance(error.filename, str) else None
    other = f" ({printable(named)})" if named and printable(named) != what else ""
    if error.errno in _SHORT:
        return OutOfResources(f"{what}: {reason}{other}; raise this limit (ulimit) or use less")
    if writing:
        return OutOfResources(f"can't write {what}: {reason}{other}")
    return UnreadableInput(f"can't read {what}: {reason}{other}")


def system_error(error: BaseException) -> OSError | None:
    """``error`` as an OSError where it is one, or says what one would: safetensors' "I/O error: No
    space left on device (os error 28)", Python 3.11's "Symlink loop from ..."."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = int(found[1]) if found else errno.ELOOP if "Symlink loop" in str(error) else None
    return None if number is None else OSError(number, os.strerror(number))


@contextmanager
def _refused(what: object, *, writing: bool, places: Sequence[Path] = ()) -> Iterator[None]:
    try:
        yield
    except HysparseError:
        raise
    except Exception as error:
        refusal = system_error(error)
        if refusal is None or _is_elsewhere(refusal, places):
            raise
        raise from_system(refusal, what, writing=writing) from error


def _is_elsewhere(refusal: OSError, places: Sequence[Path]) -> bool:
    """Whether ``refusal`` names a path that has nothing to do with ``places``, if there are any."""
    if not places or not refusal.filename:
        return False
    named = Path(os.fsdecode(refusal.filename))
    return not any(named.is_relative_to(x) or x.is_relative_to(named) for x in places)
