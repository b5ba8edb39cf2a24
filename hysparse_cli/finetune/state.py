"""The state of a run on disk, from which a killed run goes on exactly where it was.

It lies beside the output, in ``OUT.state/``: a folder for the last saved step, there whole or not
at all, removed when OUT is there. In it are the sharded tensors, as torch.distributed.checkpoint
writes them, so that any number of processes can go on, and ``run.pt`` with the rest.
"""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hysparse_cli.errors import InvalidRecipe, OutOfResources, UnreadableInput
from hysparse_cli.finetune.group import Group
from hysparse_cli.finetune.metadata import Reader
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.staging import sync, sync_tree

FORMAT = 2
_FACTS, _PARTIAL, _STEP = "run.pt", "partial", "step-"
_MAY_CHANGE = {
    "resume",
    "save_every_steps",
    "overwrite",
    "trust_remote_code",
    "device",
    "log_to",
    "nproc_per_node",
    "sequence_parallel_size",
    "stop_when_rising_steps",
}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Facts = dict[str, Any]
Tensors = dict[str, Any]


def state_folder(out: Path) -> Path:
    """Where the state of a run that writes ``out`` lies."""
    return out.with_name(f"{out.name}.state")


def saved_state(out: Path) -> Path | None:
    """The folder of the last step that was saved for ``out``."""
    return _last(state_folder(out))


def begin_or_resume(out: Path, options: FinetuneOptions) -> Path | None:
    """The folder of the state to go on from, or None for a run that begins.

    Raises: InvalidRecipe where a state is there and it is not said what to do with it, or
        ``resume`` names none.
    """
    last, asked = saved_state(out), options.resume
    if asked == "auto" and last is not None:
        return last
    given = None
    if asked is not None and asked != "auto":
        given = _given(Path(asked))
        if last is not None and given.resolve().parent == last.resolve().parent:
            return given
    if last is not None:
        if not options.overwrite:
            raise InvalidRecipe(
                f"{state_folder(out)} holds the state of a run that was stopped: --resume auto "
                "goes on with it, --overwrite begins again"
            )
        remove_state(out)
    return given


def _given(folder: Path) -> Path:
    found = folder if (folder / _FACTS).is_file() else _last(folder)
    if found is None:
        raise InvalidRecipe(
            f"nothing to resume: {folder} is no folder of a state, such as OUT.state; --resume "
            "auto goes on where there is one and begins where there is none"
        )
    return found


def _last(folder: Path) -> Path | None:
    return max(folder.glob(f"{_STEP}*[0-9]"), default=None)


def run_of(checkpoint: Path, options: FinetuneOptions) -> dict[str, Any]:
    """What must be the same for a state to be gone on with."""
    assert options.data is not None
    fields = options.model_dump(mode="json", exclude=_MAY_CHANGE)
    file = Path(options.data)
    size = file.stat().st_size if file.is_file() else None
    return {"checkpoint": str(checkpoint.resolve()), "bytes of data": size, **fields}


def save_state(out: Path, number: int, tensors: Tensors, facts: Facts, group: Group) -> None:
    """Replace the saved state by that of step ``number``; killed at any moment, one stays, whole.

    Args:
        tensors: named, of this process's share. facts: of the first process are kept.
    Raises: OutOfResources where the disk is full; the state before stays.
    """
    folder = state_folder(out)
    partial, rng = folder / _PARTIAL, group.from_each(_rng_state())
    try:
        if group.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        group.from_first(None)
        save(tensors, storage_writer=FileSystemWriter(partial))
        if group.is_first:
            torch.save({"format": FORMAT, **facts, "rng": rng}, partial / _FACTS)
            sync_tree(partial)
            _replace(folder, partial, f"{_STEP}{number:09}")
    except (OSError, CheckpointException, RuntimeError) as error:
        if isinstance(error, CheckpointException) and _interrupted(error):
            raise KeyboardInterrupt from error
        if not _no_space(error):
            raise
        if group.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise OutOfResources(
            f"disk full while saving step {number} to {folder}: free some space, then --resume "
            "auto; the state before this one is kept"
        ) from error


def read_facts(saved: Path, checkpoint: Path, options: FinetuneOptions) -> Facts:
    """What ``save_state`` was given of the run in the folder ``saved``.

    Raises: UnreadableInput where it can't be read; InvalidRecipe where it belongs to a run of
        another checkpoint, other data or other options.
    """
    file = saved / _FACTS
    try:
        facts: Facts = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds where it is not what save_state wrote
        raise _unreadable(file, error) from None
    if facts.get("format") != FORMAT:
        raise InvalidRecipe(f"{file} was written by another version: begin again with --overwrite")
    then, now = facts["run"], run_of(checkpoint, options)
    if changed := sorted(key for key in now if then.get(key) != now[key]):
        what = "; ".join(f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in changed)
        raise InvalidRecipe(f"{saved} belongs to another run: {what}")
    return facts


def read_tensors(saved: Path, tensors: Tensors) -> None:
    """Fill ``tensors``, named as they were saved, in place.

    Raises: UnreadableInput where they can't be read.
    """
    try:
        load(tensors, storage_reader=Reader(saved))
    except CheckpointException as error:
        raise _unreadable(saved, next(iter(error.failures.values()))[0]) from None


def remove_state(out: Path) -> None:
    """Remove what ``save_state`` wrote."""
    folder = state_folder(out)
    for path in (*folder.glob(f"{_STEP}*"), folder / _PARTIAL):
        shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def restore_rng(facts: Facts, group: Group) -> None:
    """Set torch's random generators to where they were, on as many processes as there were."""
    if len(facts["rng"]) != group.world_size:
        return
    own = facts["rng"][group.rank]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None and group.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"])


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _replace(folder: Path, partial: Path, name: str) -> None:
    """Make ``partial`` the state, and remove every other."""
    shutil.rmtree(folder / name, ignore_errors=True)  # left by a run that went on from before it
    os.replace(partial, folder / name)
    sync(folder)
    for old in folder.glob(f"{_STEP}*"):
        if old.name != name:
            shutil.rmtree(old)


def _interrupted(error: CheckpointException) -> bool:
    return any(isinstance(failure, KeyboardInterrupt) for failure, _ in error.failures.values())


def _no_space(error: BaseException) -> bool:
    """Whether ``error`` or what caused it says that the disk is full."""
    if isinstance(error, CheckpointException):
        return any(_no_space(failure) for failure, _ in error.failures.values())
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _NO_SPACE:
            return True
        found = found.__cause__ or found.__context__
    return False


def _unreadable(what: Path, error: BaseException) -> UnreadableInput:
    reason = " ".join(str(error).split())
    return UnreadableInput(f"{what} can't be read: {reason}; begin again without it")
