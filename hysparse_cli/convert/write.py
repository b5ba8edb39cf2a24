"""Writes a converted checkpoint by its plan: weights stream, the folder appears when it is whole.

The weights stay what they are. Sparse layers get new tensors (gates and sinks) in a shard of their
own, config.json says which layers are sparse.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hysparse_cli import __version__
from hysparse_cli.convert.card import model_card
from hysparse_cli.convert.loadable import Loadable, check_loadable
from hysparse_cli.convert.plan import Plan
from hysparse_cli.files.checkpoint import INDEX, SINGLE, StoredTensor, copy_side_files, side_files
from hysparse_cli.files.healed import REPORT_NAME
from hysparse_cli.files.output import require_free_space, staged, sync
from hysparse_cli.files.provenance import provenance
from hysparse_cli.files.shards import DTYPES, Piece, ShardWriter, pack
from hysparse_cli.model.config import HUB_SHIM, HUB_SHIM_NAME
from hysparse_cli.printable import printable
from hysparse_cli.recipe import bytes_of, to_yaml

RECIPE_NAME = "hysparse_recipe.yaml"
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """A finished conversion. ``non_finite``: tensor -> how many of its values are NaN or infinite.

    ``source_files``: what identifies each file that was read (see provenance.py). ``loadable``:
    what loading it showed (see loadable.py).
    """

    plan: Plan
    out: Path
    files: dict[str, int]
    source_files: dict[str, dict[str, Any]]
    non_finite: dict[str, int]
    seconds: float
    loadable: Loadable

    @property
    def warnings(self) -> list[str]:
        found = [*self.plan.warnings, *self.loadable.warnings]
        if self.non_finite:
            name, count = next(iter(self.non_finite.items()))
            found.append(
                f"{len(self.non_finite)} tensors hold NaN or infinity, such as {printable(name)} "
                f"({count} values): the model will not work"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """The report: the plan, what was written, and from what."""
        packages = ("torch", "transformers", "safetensors")
        versions = {"python": platform.python_version(), "hysparse": __version__}
        return {
            "schema": "hysparse.convert/1",
            "plan": self.plan.as_json(),
            "out": str(self.out),
            "files": self.files,
            "source_files": self.source_files,
            "non_finite": self.non_finite,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
            "versions": versions | {p: version(p) for p in packages},
        }


def execute(plan: Plan, out: Path, on_progress: OnProgress) -> Conversion:
    """Carry out ``plan``: ``out`` is absent, or what it was, until all of it is on the disk.

    Args:
        on_progress: is told bytes done and bytes in all.
    Raises: InvalidRecipe where ``out`` may not be written; OutOfResources where the disk is full;
        UnreadableInput where what would be written could not be loaded.
    """
    start = time.monotonic()
    checkpoint, options = plan.dense.checkpoint, plan.options
    folder = checkpoint.folder
    with staged(out, overwrite=options.overwrite, inputs=[folder]) as partial:
        require_free_space(out, plan.output_bytes)
        copy_side_files(folder, partial, with_code=options.trust_remote_code)
        _write_json(partial / "config.json", plan.config)
        (partial / HUB_SHIM_NAME).write_text(HUB_SHIM, encoding="utf-8")
        loadable = check_loadable(partial, folder, with_code=options.trust_remote_code)
        written = write_weights(plan, partial, on_progress)
        if list(written.files) != [SINGLE]:
            _write_json(partial / INDEX, written.index)
        (partial / RECIPE_NAME).write_text(to_yaml(options), encoding="utf-8")
        (partial / "README.md").write_text(model_card(plan), encoding="utf-8")
        conversion = Conversion(
            plan=plan,
            out=out,
            files=written.files,
            source_files=provenance(
                checkpoint, side_files(folder, with_code=options.trust_remote_code)
            ),
            non_finite=written.non_finite,
            seconds=time.monotonic() - start,
            loadable=loadable,
        )
        _write_json(partial / REPORT_NAME, conversion.as_json())
    return conversion


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
    kept = (plan.renamed.get(name, name) for name in plan.dense.checkpoint.tensors)
    unknown = measured.keys() - plan.new_tensors.keys() - set(kept)
    assert not unknown, f"measured, but in no shard: {sorted(unknown)}"
    new = [
        Piece(name, getattr(torch, plan.dtype), tensor.shape, None, tensor.fill, measured.get(name))
        for name, tensor in plan.new_tensors.items()
    ]
    sources = plan.dense.checkpoint.shards
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


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
