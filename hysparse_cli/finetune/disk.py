"""Estimates the disk that a run needs, from headers, before anything is loaded."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hysparse_cli.errors import OutOfResources
from hysparse_cli.files.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from hysparse_cli.finetune.state import saved_state, state_folder
from hysparse_cli.finetune.trainable import NEW, adapts_sparse_only, attention_names, in_group
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.units import format_bytes

STATE_BYTES = 12  # of a trained parameter: its weight and AdamW's two moments, in float32
ROW_BYTES = 24  # of a token in the buffer of rows: its id, position and label
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of the checkpoint to write, and of one saved state; 0 where none is saved."""

    output: int
    state: int


def disk_need(source: Path, options: FinetuneOptions) -> DiskNeed:
    """What the run of ``options`` on the checkpoint ``source`` writes, by its headers."""
    checkpoint = open_checkpoint(source)
    itemsize = _ITEMSIZE.get(options.dtype)
    output = sum(_elements(t) * itemsize if itemsize else t.size for t in _tensors(checkpoint))
    if options.steps_between_saves is None:
        return DiskNeed(output, 0)
    rows = options.shuffle_rows * options.sequence_tokens * ROW_BYTES
    return DiskNeed(output, _num_trained(checkpoint, options) * STATE_BYTES + rows)


def require_disk(out: Path, need: DiskNeed, options: FinetuneOptions) -> str:
    """A line that says what state needs of the disk.

    Raises: OutOfResources where there is not enough for ``out`` and two states, since the next is
        written before the last goes.
    """
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    free, there = shutil.disk_usage(place).free, saved_state(out) is not None
    if free < need.output + need.state * (1 if there else 2):
        state = f", its state two times {format_bytes(need.state)} meanwhile" if need.state else ""
        without = "; save_every_steps: off does without state" if need.state else ""
        raise OutOfResources(
            f"disk full: {out} needs {format_bytes(need.output)}{state}, and {place} has "
            f"{format_bytes(free)} free: free some, or give OUT on another disk{without}"
        )
    if options.steps_between_saves is None:
        return "no state is saved (save_every_steps: off): a run that is killed begins again"
    every = options.steps_between_saves
    return (
        f"state is saved every {every} step{'s' * (every > 1)} in {state_folder(out)}: about "
        f"{format_bytes(need.state)} of disk, twice that while saving"
    )


def _num_trained(checkpoint: Checkpoint, options: FinetuneOptions) -> int:
    """Elements of the parameters that any stage trains."""
    base = checkpoint.config.get("base_model_type") or checkpoint.config.get("model_type")
    config: Any = SimpleNamespace(**{**checkpoint.config, "model_type": base})
    groups = {stage.trainable for stage in options.resolved_stages()}
    belongs = [in_group(config, group) for group in groups]
    trained = [t for t in _tensors(checkpoint) if any(has(t.name) for has in belongs)]
    if options.lora_rank is None:
        return sum(map(_elements, trained))
    adapted = attention_names(config, sparse_only=adapts_sparse_only(options))
    matrices = [t for t in _tensors(checkpoint) if adapted(t.name) and len(t.shape) == 2]
    new = sum(_elements(t) for t in trained if NEW in t.name)
    return new + sum(options.lora_rank * sum(t.shape) for t in matrices if NEW not in t.name)


def _tensors(checkpoint: Checkpoint) -> Iterator[StoredTensor]:
    return (tensor for shard in checkpoint.shards for tensor in shard.tensors)


def _elements(tensor: StoredTensor) -> int:
    return prod(tensor.shape)
