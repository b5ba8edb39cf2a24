"""Writes the files of ``hysparse inspect-topk``, each whole or not at all."""

import html
import json
import os
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from hysparse_cli.errors import InvalidRecipe, writes
from hysparse_cli.files.output import prepare_file, whole_file
from hysparse_cli.files.replaceable import lies_in
from hysparse_cli.inspect_topk.result import Inspection
from hysparse_cli.printable import printable
from hysparse_cli.recipe import InspectOptions

MARK = "hysparse inspect-topk"
_BEGINNING_BYTES = 4096


def check_files(checkpoint: str, options: InspectOptions) -> None:
    """Check what can be checked before any work is done.

    Raises: InvalidRecipe where a file is not to be written or replaced; OutOfResources where it
        can't be.
    """
    taken: dict[str, str] = {}
    for kind, path in _asked(options).items():
        wrong = f"{kind} {printable(path)} can't be written"
        with writes(printable(path)):
            if not path.absolute().parent.is_dir():
                raise InvalidRecipe(f"{wrong}: there is no such folder")
            if path.is_dir():
                raise InvalidRecipe(f"{wrong}: it is a folder")
            if lies_in(path, Path(os.path.expanduser(checkpoint))):
                raise InvalidRecipe(f"{wrong}: it lies in the checkpoint, which is left as it is")
            if os.path.lexists(path) and not _is_ours(kind, path):
                raise InvalidRecipe(
                    f"{wrong}: something is there that is no {kind} of inspect-topk: give another "
                    "name, or remove it"
                )
        if (other := taken.setdefault(os.path.realpath(path), kind)) != kind:
            raise InvalidRecipe(f"{wrong}: {other} is to be written there")
        prepare_file(path)


def write_files(inspection: Inspection) -> None:
    """Write what the options name.

    Raises: OutOfResources where a file can't be written.
    """
    for kind, path in _asked(inspection.options).items():
        with whole_file(path) as partial:
            WRITERS[kind](inspection, partial)


def _asked(options: InspectOptions) -> dict[str, Path]:
    """Kind -> where to write it."""
    paths = {kind: getattr(options, kind) for kind in WRITERS}
    return {kind: Path(path) for kind, path in paths.items() if path is not None}


def _is_ours(kind: str, path: Path) -> bool:
    """Whether an ordinary file begins as ``kind`` does where this command wrote it."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return BEGINNINGS[kind].match(file.read(_BEGINNING_BYTES)) is not None


def arrays(inspection: Inspection) -> dict[str, Any]:
    """NumPy arrays by name: what the JSON has as lists, and every token's selected blocks.

    map.N: (G, rows, columns), NaN where no query sees a key; kept.N: (G, lags), distances.N:
    (G, bins); selected.N: (T, G, K) int32, -1 pads; overlap, answer_overlap: (layers, layers).
    """
    import numpy as np

    found: dict[str, Any] = {}
    for full in inspection.full_layers:
        found[f"map.{full.layer}"] = np.array([head.map for head in full.heads], np.float64)
        moves = [head.movement for head in full.heads if head.movement is not None]
        if moves:
            found[f"kept.{full.layer}"] = np.array([move.kept for move in moves], np.float64)
            found[f"distances.{full.layer}"] = np.array([move.distances for move in moves])
        found[f"selected.{full.layer}"] = inspection.selections[full.layer].numpy()
    for name in ("overlap", "answer_overlap"):
        if getattr(inspection, name) is not None:
            found[name] = np.array(getattr(inspection, name))
    return found


def _write_npz(inspection: Inspection, path: Path) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez_compressed(file, **arrays(inspection))


def _write_lists(inspection: Inspection, path: Path) -> None:
    from safetensors.torch import save

    lists = {
        f"layer.{layer}": selection.to(torch.int32).contiguous()
        for layer, selection in inspection.selections.items()
    }
    path.write_bytes(save(lists, metadata={"block_size": str(inspection.spec.block_size)}))


def _write_html(inspection: Inspection, path: Path) -> None:
    """page.html with the JSON inside: it draws that object and needs nothing else."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(inspection.as_json(), ensure_ascii=False).replace("<", "\\u003c")
    page = template.replace("__TITLE__", html.escape(inspection.checkpoint))
    path.write_text(page.replace("__DATA__", data), encoding="utf-8")


def _write_png(inspection: Inspection, path: Path) -> None:
    from hysparse_cli.inspect_topk.plot import as_figure

    as_figure(inspection).savefig(path, format="png", dpi=150, metadata={"Software": MARK})


BEGINNINGS = {
    "html": re.compile(rb"<!doctype html>.*<title>inspect-topk: ", re.DOTALL),
    "png": re.compile(rb"\x89PNG.*Software\0hysparse inspect-topk", re.DOTALL),
    "npz": re.compile(rb"PK.{28}(map|kept|distances|selected)\.\d+\.npy", re.DOTALL),
    "lists": re.compile(rb".{8}\{[^\0]*\"block_size\"", re.DOTALL),
}
WRITERS: dict[str, Callable[[Inspection, Path], None]] = {
    "html": _write_html,
    "png": _write_png,
    "npz": _write_npz,
    "lists": _write_lists,
}
