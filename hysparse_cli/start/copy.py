"""Keeps q, k, v and o of each sparse layer, and fits its gates (``--init copy``)."""

from typing import Any

from torch import Tensor

from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.start.fit import fit_all_gates
from hysparse_cli.start.result import OnProgress, Start, counted


def copy(model: Any, spec: HysparseSpec, rows: Tensor, on_progress: OnProgress) -> Start:
    """The fitted gates of every sparse layer (see ``fit_all_gates``)."""
    steps = len(rows) + len(spec.layers.sparse_layers)
    return fit_all_gates(model, spec, rows, {}, {}, counted(on_progress, steps))
