"""The state of a run on disk, from which a killed run goes on exactly where it was.

It lies beside the output, in ``OUT.state/``: one file, replaced whole, removed when OUT is there.
"""

import errno
import os
from pathlib import Path
from typing import Any

import torch

from hysparse_cli.errors import InvalidRecipe, OutOfResources, UnreadableInput
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.staging import sync

FORMAT = 1
_FILE = "state.pt"
_MAY_CHANGE = {"resume", "save_every_steps", "overwrite", "device"}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

State = dict[str, Any]


def state_folder(out: Path) -> Path:
    """Where the state of a run that writes ``out`` lies."""
    return out.with_name(f"{out.name}.state")


def begin_or_resume(out: Path, checkpoint: Path, options: FinetuneOptions) -> State | None:
    """The state to go on from, or None for a run that begins.

    Raises: InvalidRecipe where a state is there and it is not said what to do with it, or none is
        and ``resume`` is set, or it belongs to a run with other options; UnreadableInput where it
        can't be read.
    """
    folder = state_folder(out)
    saved = folder / _FILE
    if options.resume:
        if not saved.is_file():
            raise InvalidRecipe(f"nothing to resume: {saved} does not exist; leave --resume out")
        return _read(saved, checkpoint, options)
    if saved.is_file():
        if not options.overwrite:
            raise InvalidRecipe(
                f"{folder} holds the state of a run that was stopped: --resume goes on with it, "
                "--overwrite begins again"
            )
        remove_state(out)
    return None


def run_of(checkpoint: Path, options: FinetuneOptions) -> dict[str, Any]:
    """What must be the same for a state to be gone on with."""
    assert options.data is not None
    fields = options.model_dump(mode="json", exclude=_MAY_CHANGE)
    size = Path(options.data).expanduser().stat().st_size
    return {"checkpoint": str(checkpoint.resolve()), "bytes of data": size, **fields}


def save_state(out: Path, state: State) -> None:
    """Replace the saved state by ``state``; killed at any moment, one of both is there, whole.

    Raises: OutOfResources where the disk is full; the state before stays.
    """
    folder = state_folder(out)
    partial = folder / f"{_FILE}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state, "rng": _rng_state()}, file)
        sync(partial)
        os.replace(partial, folder / _FILE)
        sync(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno not in _NO_SPACE:
            raise
        raise OutOfResources(
            f"disk full while saving step {state['step']} to {folder}: free some space, then "
            "--resume; the state before this one is kept"
        ) from error


def remove_state(out: Path) -> None:
    """Remove what ``save_state`` wrote."""
    folder = state_folder(out)
    for name in (_FILE, f"{_FILE}.partial"):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def restore_rng(state: State) -> None:
    """Set torch's random generators to where they were."""
    torch.set_rng_state(state["rng"]["cpu"])
    if state["rng"]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _read(saved: Path, checkpoint: Path, options: FinetuneOptions) -> State:
    try:
        state: State = torch.load(saved, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableInput(f"{saved} can't be read: {reason}; begin again without it") from None
    if state.get("format") != FORMAT:
        raise InvalidRecipe(f"{saved} was written by another version: begin again with --overwrite")
    then, now = state["run"], run_of(checkpoint, options)
    if changed := sorted(key for key in now if then.get(key) != now[key]):
        what = "; ".join(f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in changed)
        raise InvalidRecipe(f"{saved} belongs to another run: {what}")
    return state
