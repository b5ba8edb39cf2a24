"""Holds what ``hysparse inspect-topk`` found, and gives it as JSON."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from hysparse_cli.files.rounding import rounded
from hysparse_cli.inspect_topk.branches import BranchStatistics
from hysparse_cli.inspect_topk.needle import Effect, LayerNeedle
from hysparse_cli.inspect_topk.selection import LAGS, Map, Movement
from hysparse_cli.inspect_topk.statistics import Fit
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.recipe import InspectOptions

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "hysparse.inspect-topk/2"
DIGITS = 5  # more than a text can tell


@dataclass(frozen=True)
class Head:
    """One KV head's selection. movement: None where no query chooses."""

    map: Map
    movement: Movement | None


@dataclass(frozen=True)
class FullLayer:
    """A full layer that serves others, one ``Head`` for each KV head."""

    layer: int
    serves: list[int]
    heads: list[Head]


@dataclass(frozen=True)
class ServedLayer:
    """How well a layer is served, over all queries and over those that predict an answer.

    fit, answer_fit: None where none of them chooses, or no answer is known. branches: None in a
    dense model, which has none.
    """

    layer: int
    server: int
    fit: Fit | None
    answer_fit: Fit | None
    branches: BranchStatistics | None


@dataclass(frozen=True)
class NeedleBlock:
    """A block that holds part of the needle, and what every layer does with it."""

    block: int
    layers: list[LayerNeedle]


@dataclass(frozen=True)
class Needle:
    """Token ranges are [begin, end); ``queries`` are the positions that look for the needle."""

    text: str
    tokens: tuple[int, int]
    answer: str
    answer_tokens: tuple[int, int]
    queries: list[int]
    blocks: list[NeedleBlock]
    effects: list[Effect]


@dataclass(frozen=True)
class Inspection:
    """One checkpoint on one text of ``tokens`` tokens, which ``source`` names.

    kind: "dense" is a dense model under the layout of ``spec``, as it would be; "converted" runs as
    it is. overlap: [a][b], how much of b's attention mass on its own best blocks is on those that a
    selects; None where no query chooses; answer_overlap: over the queries that predict an answer.
    selections: full layer -> (T, G, K) block indices.
    """

    checkpoint: str
    kind: Literal["dense", "converted"]
    options: InspectOptions
    environment: dict[str, Any]
    spec: HysparseSpec
    source: str
    tokens: int
    full_layers: list[FullLayer]
    served_layers: list[ServedLayer]
    overlap: list[list[float]] | None
    answer_overlap: list[list[float]] | None
    needle: Needle | None
    selections: "dict[int, Tensor]"

    @property
    def num_blocks(self) -> int:
        return -(-self.tokens // self.spec.block_size)

    def as_json(self) -> dict[str, Any]:
        """docs/schema/inspect-topk.json; without the selections, which ``npz`` has."""
        found: dict[str, Any] = rounded(
            {
                "full_layers": [asdict(layer) for layer in self.full_layers],
                "served_layers": [asdict(layer) for layer in self.served_layers],
                "overlap": self.overlap,
                "answer_overlap": self.answer_overlap,
                "needle": None if self.needle is None else asdict(self.needle),
            },
            DIGITS,
        )
        return {
            "schema": SCHEMA,
            "checkpoint": self.checkpoint,
            "kind": self.kind,
            "options": self.options.model_dump(mode="json"),
            "environment": self.environment,
            "hysparse": asdict(self.spec),
            "source": self.source,
            "tokens": self.tokens,
            "num_blocks": self.num_blocks,
            "lags": list(LAGS),
            **found,
        }
