"""What ``hysparse inspect-topk`` found, as heatmaps and a table, and as JSON."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hysparse_cli.inspect_topk.stats import Fit
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.recipe import InspectOptions

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

SCHEMA = "hysparse.inspect-topk/1"

# share of queries above which a cell looks so; the shade reads without colour too
SHADES = ((0.75, "█", "bright_yellow"), (0.5, "▓", "orange1"), (0.25, "▒", "deep_pink3"))
FAINT, NEVER, HIDDEN = ("░", "purple4"), ("·", "grey35"), " "


@dataclass(frozen=True)
class FullLayer:
    """maps: [KV head][row][column], see ``selection_maps``."""

    layer: int
    serves: list[int]
    maps: list[list[list[float | None]]]


@dataclass(frozen=True)
class ServedLayer:
    """fit: None where every query sees no more blocks than are kept. Gates are means over all."""

    layer: int
    server: int
    fit: Fit | None
    gate_sparse: float
    gate_window: float


@dataclass(frozen=True)
class Inspection:
    """The selection of one checkpoint on one text of ``tokens`` tokens."""

    checkpoint: str
    options: InspectOptions
    environment: dict[str, Any]
    spec: HysparseSpec
    tokens: int
    full_layers: list[FullLayer]
    served_layers: list[ServedLayer]

    def table(self) -> "Group":
        from rich.columns import Columns
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [Text(self._headline())]
        for full in self.full_layers:
            serves = ", ".join(map(str, full.serves))
            parts += [Text(), Text(f"Layer {full.layer}, serves {serves}", style="bold")]
            parts.append(Columns([_heatmap(i, cells) for i, cells in enumerate(full.maps)]))
        return Group(*parts, Text(), _legend(), Text(), self._served_table())

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "checkpoint": self.checkpoint,
            "options": self.options.model_dump(mode="json"),
            "environment": self.environment,
            "hysparse": asdict(self.spec),
            "tokens": self.tokens,
            "full_layers": [asdict(layer) for layer in self.full_layers],
            "served_layers": [asdict(layer) for layer in self.served_layers],
        }

    def _headline(self) -> str:
        spec = self.spec
        return (
            f"{self.checkpoint}: {spec.pattern}, {self.tokens:,} tokens, top {spec.top_k_blocks} "
            f"blocks of {spec.block_size}"
        )

    def _served_table(self) -> "Table":
        from rich import box
        from rich.table import Table

        table = Table(
            title="Served layers: recall of own top blocks, mass of own attention",
            title_justify="left",
            caption=self._caption(),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        columns = ("layer", "by", "recall", "random", "mass", "own best", "random", "window")
        for name in (*columns, "gates"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.served_layers:
            cells = ["-"] * 6
            if (fit := layer.fit) is not None:
                shares = (fit.recall, fit.recall_random, fit.mass_selected, fit.mass_own_best)
                cells = [f"{x:.0%}" for x in (*shares, fit.mass_random, fit.mass_window)]
            gates = f"{layer.gate_sparse:.2f} {layer.gate_window:.2f}"
            table.add_row(str(layer.layer), str(layer.server), *cells, gates)
        return table

    def _caption(self) -> str:
        spec, fits = self.spec, [x.fit.queries for x in self.served_layers if x.fit is not None]
        gates = "gates: block-sparse, window (means)"
        if not fits:
            return (
                f"{gates}; up to {spec.top_k_tokens:,} tokens every block is selected: give a "
                "longer text to see recall and mass"
            )
        queries = f"{fits[0]:,} queries that see more than {spec.top_k_tokens:,} tokens"
        return f"means over the {queries}; {gates}"


def _heatmap(head: int, cells: list[list[float | None]]) -> "Text":
    from rich.text import Text

    picture = Text(f"KV head {head}".ljust(len(cells[0])))
    for row in cells:
        picture.append("\n")
        for value in row:
            picture.append(*_shade(value))
    return picture


def _shade(value: float | None) -> tuple[str, str]:
    if value is None:
        return HIDDEN, ""
    for least, letter, style in SHADES:
        if value > least:
            return letter, style
    return FAINT if value > 0 else NEVER


def _legend() -> "Text":
    from rich.text import Text

    legend = Text("Down: queries, right: keys. Selected: ")
    legend.append(*NEVER).append(" never ").append(*FAINT).append(" some")
    for least, letter, style in reversed(SHADES):
        legend.append(" ").append(letter, style).append(f" >{least:.0%}")
    return legend
