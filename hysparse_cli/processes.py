"""Knows a process among those that torchrun, accelerate or ``--nproc-per-node`` started.

A launcher tells each process its place in the environment. Results are for the first process to
print. An error may strike any of them, and takes the others down with it: only the first to fail
says why.
"""

import os
import sys
from pathlib import Path

_CLAIM = "hysparse-exit-code"


def rank() -> int:
    """This process's number among all, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def fails_first(exit_code: int) -> bool:
    """Whether no other process of this run has failed yet; leaves ``exit_code`` for the launcher.

    torch's launchers give every process a file of its own to describe an error in, in one folder
    for all processes of a machine. Without one, the first process speaks for all.
    """
    if world_size() == 1:
        return True
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own:
        return rank() == 0
    try:
        with (Path(own).parents[1] / _CLAIM).open("x") as file:
            file.write(str(exit_code))
    except FileExistsError:
        return False
    return True


def claimed_exit_code(folder: Path) -> int | None:
    """The exit code that the first process to fail left below ``folder``, if one did."""
    claims = [path.read_text(encoding="utf-8") for path in folder.rglob(_CLAIM)]
    return int(claims[0]) if claims and claims[0] else None


def keep_working_directory_out() -> None:
    """Let no Python process that this one starts import modules of the working directory, where a
    ``random.py`` may lie. What PYTHONPATH names is found as before."""
    os.environ["PYTHONSAFEPATH"] = "1"


def running(module: str) -> list[str]:
    """The arguments for Python that run ``module`` and import from where this process does."""
    code = (
        f"import sys; sys.path[:] = {[str(place) for place in sys.path]!r}; import runpy; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return ["-P", "-c", code]
