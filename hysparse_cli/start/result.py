"""Holds what a measured start gives to ``hysparse convert``."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hysparse_cli.model.config import HysparseSpec

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerStart:
    """How well a sparse layer fits the dense one, measured where it starts.

    All are ||o - o_dense||^2 / ||o_dense||^2 of the attention output before the output projection,
    over the calibration text. half: both gates one half, o and v as they were, as ``constant``
    starts. copied, best: the best gates there are for each token, with o and v as they were and as
    they become. fitted: with the fitted gates; ``by_head`` for each query head. gates: means of the
    fitted gates, block-sparse and SWA.
    """

    half: float
    copied: float
    best: float
    fitted: float
    by_head: tuple[float, ...]
    gates: tuple[float, float]


@dataclass(frozen=True)
class Start:
    """Tensors by full name, new ones and changed dense ones, and the fit of each sparse layer."""

    tensors: dict[str, Tensor]
    fits: dict[int, LayerStart]

    def as_json(self) -> dict[str, Any]:
        """Relative squared errors of the attention output, by sparse layer."""
        return {str(layer): vars(fit) for layer, fit in self.fits.items()}


Init = Callable[[Any, HysparseSpec, Tensor, OnProgress], Start]


def counted(on_progress: OnProgress, steps: int) -> Callable[[], None]:
    """What to call after each of ``steps`` steps, so that ``on_progress`` hears of them."""
    done = itertools.count(1)
    on_progress(0, steps)
    return lambda: on_progress(next(done), steps)
