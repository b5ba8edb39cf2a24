"""The files that ``hysparse inspect-topk`` writes: each whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.inspect_topk.result import Inspection
from hysparse_cli.recipe import InspectOptions
from hysparse_cli.staging import whole_file


def check_files(options: InspectOptions) -> None:
    """Raises: InvalidRecipe where a file can't be written, before any work is done."""
    for kind in WRITERS:
        path = getattr(options, kind)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise InvalidRecipe(f"{kind} {path} can't be written: there is no such folder")
        if path is not None and Path(path).is_dir():
            raise InvalidRecipe(f"{kind} {path} can't be written: it is a folder")


def write_files(inspection: Inspection) -> None:
    """Write what the options name.

    Raises: InvalidRecipe where a file can't be written.
    """
    for kind, write in WRITERS.items():
        name = getattr(inspection.options, kind)
        if name is None:
            continue
        path = Path(name)
        try:
            with whole_file(path) as partial:
                write(inspection, partial)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            raise InvalidRecipe(f"{kind} {path} can't be written: {reason}") from None


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
    from hysparse_cli.inspect_topk.page import as_page

    path.write_text(as_page(inspection), encoding="utf-8")


def _write_png(inspection: Inspection, path: Path) -> None:
    from hysparse_cli.inspect_topk.plot import as_figure

    as_figure(inspection).savefig(path, format="png", dpi=150)


WRITERS: dict[str, Callable[[Inspection, Path], None]] = {
    "html": _write_html,
    "png": _write_png,
    "npz": _write_npz,
    "lists": _write_lists,
}
