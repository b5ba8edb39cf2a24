"""The damage ledger: what each mechanism of HySparse costs, step by step from the dense model.

One model in memory, whose switches change between forwards (model/state.py, Variation). Each step
adds a mechanism: selected blocks of the layer's own keys and values; the server's in their place;
the SWA branch, both merged as one softmax; gates and sinks as they are written. In total, with all
sparse layers changed, and by layer, with one changed and the others left to attend in full. Where
attention was swapped, that comes first, and every row has it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hysparse_cli.evaluate.perplexity import token_losses
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.state import ForwardOptions, Variation
from hysparse_cli.texts.calibration import CalibrationText

OnProgress = Callable[[int, int], None]


class Step(NamedTuple):
    """A rung of the ledger: its name, the switches and whether gates and sinks are in use."""

    name: str
    spec: HysparseSpec
    learned: bool


class Losses(NamedTuple):
    """Nats per token: of all tokens, and of the planted facts' answers (None without any)."""

    all: float
    answers: float | None

    def minus(self, other: "Losses") -> "Losses":
        if self.answers is None or other.answers is None:
            return Losses(self.all - other.all, None)
        return Losses(self.all - other.all, self.answers - other.answers)


@dataclass(frozen=True)
class Ledger:
    """``total[i]`` is the loss after step i in all sparse layers, ``by_layer[l][i]`` in l alone."""

    steps: tuple[str, ...]
    dense: Losses
    total: tuple[Losses, ...]
    by_layer: dict[int, tuple[Losses, ...]]
    tokens: int
    answer_tokens: int

    def after_swaps(self, dense: Losses) -> "Ledger":
        """With the step from ``dense`` to this ledger's dense model, whose attention is swapped."""
        return replace(
            self,
            steps=("swapped attention", *self.steps),
            dense=dense,
            total=(self.dense, *self.total),
            by_layer={layer: (self.dense, *steps) for layer, steps in self.by_layer.items()},
        )

    def changes(self, losses: Sequence[Losses]) -> list[Losses]:
        """What each step adds to the one before, the first to the dense model."""
        before = [self.dense, *losses]
        return [after.minus(last) for last, after in zip(before, losses, strict=False)]

    def as_json(self) -> dict[str, Any]:
        """Losses as measured, in nats per token; a change is the difference of two."""
        return {
            "schema": "hysparse.ledger/1",
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "dense": self.dense._asdict(),
            "steps": [
                {"step": name, **losses._asdict()}
                for name, losses in zip(self.steps, self.total, strict=True)
            ],
            "by_layer": {
                str(layer): [losses._asdict() for losses in steps]
                for layer, steps in self.by_layer.items()
            },
        }

    def table(self) -> Any:
        """Each step's change of the loss, in all layers and in each alone, for both losses."""
        from rich.console import Group

        tables = [self._table(0, f"all {self.tokens:,} tokens")]
        if self.answer_tokens:
            tables.append(self._table(1, f"{self.answer_tokens:,} tokens of planted answers"))
        return Group(*tables)

    def _table(self, kind: int, tokens: str) -> Any:
        from hysparse_cli.tables import Table

        title = f"damage: loss of {tokens}, dense {self.dense[kind]:.4f} nats"
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in ("layers", *self.steps, "in all"):
            table.add_column(name, justify="right")
        rows = {"all": self.total} | {str(layer): steps for layer, steps in self.by_layer.items()}
        for name, losses in rows.items():
            changes = [*self.changes(losses), losses[-1].minus(self.dense)]
            table.add_row(name, *(f"{change[kind]:+.4f}" for change in changes))
            if name == "all":
                table.add_section()
        return table


def measure_ledger(
    model: Any, spec: HysparseSpec, text: CalibrationText, on_progress: OnProgress
) -> Ledger:
    """Measure what each mechanism costs.

    Args:
        model: with sparse attention layers, as written or ``install``ed; its attention over all of
            its own keys is taken as the dense model's.
        on_progress: is told forwards done and in all: rows x (1 + steps x (1 + sparse layers)).
    """
    steps, sparse = steps_of(spec), spec.layers.sparse_layers
    places = [frozenset(sparse), *(frozenset([layer]) for layer in sparse)]
    variations = [Variation(spec, frozenset(), True)]
    variations += [Variation(s.spec, layers, s.learned) for layers in places for s in steps]
    sums = torch.zeros(len(variations), 2, dtype=torch.float64)
    forwards = len(text.rows) * len(variations)
    for r, (row, answers) in enumerate(zip(text.rows, text.answers, strict=True)):
        for i, variation in enumerate(variations):
            on_progress(r * len(variations) + i, forwards)
            sums[i] += _summed(model, row, answers, variation)
    on_progress(forwards, forwards)
    tokens, asked = text.rows[:, 1:].numel(), int(text.answers[:, 1:].sum())
    dense, *losses = (Losses(a / tokens, b / asked if asked else None) for a, b in sums.tolist())
    rungs = [tuple(losses[i : i + len(steps)]) for i in range(0, len(losses), len(steps))]
    return Ledger(
        steps=tuple(step.name for step in steps),
        dense=dense,
        total=rungs[0],
        by_layer=dict(zip(sparse, rungs[1:], strict=True)),
        tokens=tokens,
        answer_tokens=asked,
    )


def dense_losses(model: Any, text: CalibrationText) -> Losses:
    """Of a dense model, as it is."""
    rows = zip(text.rows, text.answers, strict=True)
    sums = torch.stack([_summed(model, row, answers) for row, answers in rows]).sum(0)
    asked = int(text.answers[:, 1:].sum())
    total, answered = sums.tolist()
    return Losses(total / text.rows[:, 1:].numel(), answered / asked if asked else None)


def steps_of(spec: HysparseSpec) -> list[Step]:
    """The steps from the dense model to ``spec``, the last of which is ``spec`` as it is."""
    if not spec.selects:
        return [Step("window and sinks", spec, learned=True)]
    alone = replace(spec, sparse_kv="own", window_kv="none")
    steps = [Step("selection", alone, learned=False)]
    if spec.sparse_kv == "shared":
        steps.append(Step("shared KV", replace(alone, sparse_kv="shared"), learned=False))
    if spec.window_kv != "none":
        steps.append(Step("window", spec, learned=False))
    return [*steps, Step("gates and sinks", spec, learned=True)]


@torch.no_grad()
def put_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite parameters of ``model`` by name, each cast to its dtype."""
    for name, values in tensors.items():
        model.get_parameter(name).copy_(values)


def _summed(model: Any, row: Tensor, answers: Tensor, variation: Variation | None = None) -> Tensor:
    """(2,) float64: the summed loss of all tokens of a row, and of its answers."""
    input_ids = row[None].to(model.device)
    varied = {} if variation is None else {"hysparse": ForwardOptions(variation=variation)}
    losses = token_losses(model, input_ids, **varied)[0].double().cpu()
    return torch.stack([losses.sum(), losses[answers[1:]].sum()])
