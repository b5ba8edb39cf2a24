"""What a measured start gives to ``hysparse convert``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hysparse_cli.model.config import HysparseSpec

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerFit:
    """How well a sparse layer fits the dense one, measured where it starts.

    output_error: ||o - o_dense||^2 / ||o_dense||^2 of the attention output before the output
    projection, over the calibration text: ``as_constant`` with both gates one half, ``best`` with
    the best gates there are for each token, ``fitted`` with those that were fitted; ``by_head`` is
    ``fitted`` for each query head. gates: means of the fitted gates, block-sparse and SWA.
    """

    as_constant: float
    best: float
    fitted: float
    by_head: tuple[float, ...]
    gates: tuple[float, float]


@dataclass(frozen=True)
class Start:
    """Tensors by full name, new ones and changed dense ones, and the fit of each sparse layer."""

    tensors: dict[str, Tensor]
    fits: dict[int, LayerFit]

    def as_json(self) -> dict[str, Any]:
        """Relative squared errors of the attention output, by sparse layer."""
        return {str(layer): vars(fit) for layer, fit in self.fits.items()}

    def table(self) -> Any:
        """A row a sparse layer."""
        from rich.table import Table

        caption = "squared error of the attention output, relative to the dense layer's"
        table = Table(title="start", title_justify="left", title_style="bold", caption=caption)
        for name in ("layer", "gates 1/2", "best gates", "fitted", "worst head", "mean gates"):
            table.add_column(name, justify="right")
        for layer, fit in self.fits.items():
            errors = (fit.as_constant, fit.best, fit.fitted, max(fit.by_head))
            gates = f"{fit.gates[0]:.2f} {fit.gates[1]:.2f}"
            table.add_row(str(layer), *(f"{error:.3f}" for error in errors), gates)
        return table


Init = Callable[[Any, HysparseSpec, Tensor, OnProgress], Start]
