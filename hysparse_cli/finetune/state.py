"""Saves the state of a run, from which a killed run goes on exactly where it was.

It lies beside the output, in ``OUT.state/``: a folder for the last saved step, there whole or not
at all, removed when OUT is there. In it are the sharded tensors, as torch.distributed.checkpoint
writes them, so that any number of processes can go on, and ``run.pt`` with the rest.
"""

import io
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hysparse_cli.errors import (
    InvalidRecipe,
    OutOfResources,
    UnreadableInput,
    from_system,
    system_error,
    writes,
)
from hysparse_cli.files.output import sync, sync_tree
from hysparse_cli.finetune.distributed import World
from hysparse_cli.finetune.lock import LOCK
from hysparse_cli.finetune.metadata import Reader
from hysparse_cli.printable import printable, single_line
from hysparse_cli.recipe import FinetuneOptions

FORMAT = 4
FACTS, _PARTIAL = "run.pt", "partial-"
_STEP = re.compile(r"step-([0-9]{9,})")

Facts = dict[str, Any]
Tensors = dict[str, Any]


def state_folder(out: Path) -> Path:
    """Where the state of a run that writes ``out`` lies."""
    return out.with_name(f"{out.name}.state")


def saved_state(out: Path) -> Path | None:
    """The folder of the last step that was saved for ``out``."""
    return _last(state_folder(out))


def step_of(saved: Path) -> int:
    """The number of the step in the name of a saved state."""
    return int(saved.name.rpartition("-")[2])


def kept_of(out: Path) -> str | None:
    """What an interrupt says is kept of a run, if any state is."""
    if (saved := saved_state(out)) is None:
        return None
    return (
        f"interrupted; the state of step {step_of(saved)} is kept in {saved.parent}: --resume auto "
        "goes on from there"
    )


def check_folder(out: Path) -> None:
    """Raises: InvalidRecipe where what lies at the place of ``out``'s state is something else."""
    folder = state_folder(out)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InvalidRecipe(
            f"{folder} is no folder, but a run that writes {out} keeps its state there: move it "
            "away, or give another OUT"
        )
    ours = (LOCK, _PARTIAL)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in found if not name.startswith(ours) and not _STEP.fullmatch(name)]
    if foreign:
        raise InvalidRecipe(
            f"{folder} holds {printable(foreign[0])}, which is no state of a run: move it away, or "
            "give another OUT"
        )


def state_to_resume(out: Path, options: FinetuneOptions) -> Path | None:
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
    if last is not None and not options.overwrite:
        raise InvalidRecipe(
            f"{state_folder(out)} holds the state of a run, at step {step_of(last)}: --resume auto "
            "goes on with it, --overwrite begins again"
        )
    return given


def _given(folder: Path) -> Path:
    found = folder if (folder / FACTS).is_file() else _last(folder)
    if found is None:
        raise InvalidRecipe(
            f"nothing to resume: {folder} is no folder of a state, such as OUT.state; --resume "
            "auto goes on where there is one and begins where there is none"
        )
    return found


def _last(folder: Path) -> Path | None:
    return max(_steps(folder), key=step_of, default=None)


def _steps(folder: Path) -> Iterator[Path]:
    for path in folder.glob("step-*"):
        if _STEP.fullmatch(path.name) and path.is_dir():
            yield path


def save_state(out: Path, number: int, tensors: Tensors, facts: Facts, world: World) -> None:
    """Replace the saved state by that of step ``number``; killed at any moment, one stays, whole.

    Args:
        tensors: named, of this process's shards. facts: of the first process are kept.
    Raises: OutOfResources where the disk is full or can't be written; the state before stays.
    """
    folder, rng = state_folder(out), world.from_each(_rng_state())
    # a name of its own, which no process of a run that was killed still writes to
    partial = folder / f"{_PARTIAL}{world.from_first(uuid.uuid4().hex[:8])}"
    try:
        if world.is_first:
            _remove_partial(folder)
            partial.mkdir(parents=True)
        world.from_first(None)
        save(tensors, storage_writer=FileSystemWriter(partial, sync_files=False))  # below
        if world.is_first:
            content = io.BytesIO()
            torch.save({"format": FORMAT, **facts, "rng": rng}, content)
            (partial / FACTS).write_bytes(content.getbuffer())
            sync_tree(partial)
            _replace(folder, partial, f"step-{number:09}")
    except BaseException as error:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        if _interrupted(error):
            raise KeyboardInterrupt from error
        if (refusal := _refusal(error)) is None:
            raise
        raise OutOfResources(
            f"{from_system(refusal, folder, writing=True)}; the state of step {number} is not "
            f"saved, {_kept(out)}"
        ) from error


def _kept(out: Path) -> str:
    last = saved_state(out)
    if last is None:
        return "and there is none before it"
    return f"that of step {step_of(last)} is kept: then --resume auto goes on from it"


def read_facts(saved: Path) -> Facts:
    """What ``save_state`` was given of the run in the folder ``saved``.

    Raises: UnreadableInput where it can't be read; InvalidRecipe where another version wrote it.
    """
    file = saved / FACTS
    try:
        facts = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds where it is not what save_state wrote
        raise _unreadable(file, error) from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InvalidRecipe(f"{file} was written by another version: begin again with --overwrite")
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
    with writes(folder):
        for path in list(_steps(folder)):
            _remove(path)
        _remove_partial(folder)


def restore_rng(facts: Facts, world: World) -> None:
    """Set torch's random generators to where they were, on as many processes as there were."""
    if len(facts["rng"]) != world.size:
        return
    own = facts["rng"][world.rank]
    torch.set_rng_state(own["cpu"])
    if own["cuda"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"])


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _replace(folder: Path, partial: Path, name: str) -> None:
    """Make ``partial`` the state, and remove every other."""
    if (folder / name).exists():  # left by a run that went on from before it
        _remove(folder / name)
    os.replace(partial, folder / name)
    sync(folder)
    for old in list(_steps(folder)):
        if old.name != name:
            _remove(old)


def _remove(step: Path) -> None:
    """Remove a state, which is no longer called one while it is removed."""
    doomed = step.with_name(f"{_PARTIAL}{step.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(step, doomed)
    shutil.rmtree(doomed)


def _remove_partial(folder: Path) -> None:
    for left in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def _interrupted(error: BaseException) -> bool:
    if isinstance(error, CheckpointException):
        return any(_interrupted(failure) for failure, _ in error.failures.values())
    return isinstance(error, KeyboardInterrupt)


def _refusal(error: BaseException) -> OSError | None:
    """The system's refusal that ``error`` reports, or that caused it."""
    if isinstance(error, CheckpointException):
        found = [_refusal(failure) for failure, _ in error.failures.values()]
        return next((refusal for refusal in found if refusal is not None), None)
    cause: BaseException | None = error
    while cause is not None:
        if (refusal := system_error(cause)) is not None:
            return refusal
        cause = cause.__cause__ or cause.__context__
    return None


def _unreadable(what: Path, error: BaseException) -> UnreadableInput:
    return UnreadableInput(
        f"{what} can't be read: {single_line(error)}; begin again with --overwrite"
    )
