"""The weights of a converted checkpoint: the dense model's, and the new tensors beside them."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hysparse_cli.convert.plan import Plan
from hysparse_cli.files.checkpoint import SINGLE, StoredTensor
from hysparse_cli.files.output import sync
from hysparse_cli.files.shards import DTYPES, Piece, ShardWriter, pack
from hysparse_cli.recipe import bytes_of


@dataclass(frozen=True)
class Written:
    """``files``: shard -> bytes. ``index``: the content of model.safetensors.index.json.

    ``non_finite``: tensor -> how many of its values are NaN or infinite.
    """

    files: dict[str, int]
    index: dict[str, Any]
    non_finite: dict[str, int]


def write_weights(plan: Plan, folder: Path, on_progress: Callable[[int, int], None]) -> Written:
    """Write all shards into ``folder``: source shards as they are unless the plan says repack.

    A measured start's tensors take the place of the new ones' constants and of the dense model's: a
    shard that holds one of these, or a tensor with another name, is written anew, with the same
    tensors in the same order.
    """
    start = plan.measured.start if plan.measured else None
    measured = start.tensors if start else {}
    kept = (plan.renamed.get(name, name) for name in plan.checkpoint.tensors)
    unknown = measured.keys() - plan.new_tensors.keys() - set(kept)
    assert not unknown, f"measured, but in no shard: {sorted(unknown)}"
    new = [
        Piece(name, getattr(torch, plan.dtype), tensor.shape, None, tensor.fill, measured.get(name))
        for name, tensor in plan.new_tensors.items()
    ]
    sources = plan.checkpoint.shards
    stored = [[_piece(tensor, plan, measured) for tensor in shard.tensors] for shard in sources]
    changed = [any(map(_is_changed, pieces)) for pieces in stored]
    limit = bytes_of(plan.options.max_shard_size)
    if plan.repack:
        groups = pack([piece for pieces in stored for piece in pieces] + new, limit)
    else:
        groups = stored + pack(new, limit)
    names = _shard_names(len(groups))
    done = 0
    total = sum(tensor.size for shard in sources for tensor in shard.tensors)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    writer = ShardWriter(folder, advance)
    # the disk takes a finished shard in while the next one is copied
    on_disk = []
    with one_thread(), ThreadPoolExecutor(1) as syncer:
        for position, (name, pieces) in enumerate(zip(names, groups, strict=True)):
            if plan.repack or position >= len(sources) or changed[position]:
                writer.write(pieces, name)
            else:
                writer.copy(sources[position], name)
            on_disk.append(syncer.submit(sync, folder / name))
    for shard in on_disk:
        shard.result()
    weight_map = {
        piece.name: name for name, pieces in zip(names, groups, strict=True) for piece in pieces
    }
    total_size = sum(piece.size for pieces in groups for piece in pieces)
    return Written(
        files={name: (folder / name).stat().st_size for name in names},
        index={"metadata": {"total_size": total_size}, "weight_map": weight_map},
        non_finite=dict(writer.non_finite),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: on chunks this small, more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _piece(tensor: StoredTensor, plan: Plan, measured: Mapping[str, torch.Tensor]) -> Piece:
    dtype = DTYPES[tensor.dtype]
    if dtype.is_floating_point and plan.options.dtype != "auto":
        dtype = getattr(torch, plan.dtype)
    name = plan.renamed.get(tensor.name, tensor.name)
    return Piece(name, dtype, tensor.shape, tensor, values=measured.get(name))


def _is_changed(piece: Piece) -> bool:
    renamed = piece.source is not None and piece.source.name != piece.name
    return renamed or piece.values is not None


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
