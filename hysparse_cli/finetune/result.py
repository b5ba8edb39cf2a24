"""Reports a finetuning run: each step as it happens, and the whole at the end."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hysparse_cli.finetune.identity import Run
from hysparse_cli.finetune.losses import LOSSES
from hysparse_cli.texts.documents import BadRows
from hysparse_cli.units import format_bytes

SCHEMA = "hysparse.finetune/4"
SHOWN_STEPS = 10


@dataclass(frozen=True)
class Step:
    """One optimiser step. ``number`` counts from 1 over all stages, ``stage`` from 1.

    ``loss`` is what is minimised, per predicted token; ``losses`` are what the stage measured, by
    the names of LOSSES. ``next_token_loss`` and ``distill_loss``, KL(teacher || model), are in
    nats, ``align_loss`` and ``hidden_loss`` are relative squared errors. ``tokens`` are those that
    were predicted. ``seconds`` are this step's, from reading its data to its update.
    ``peak_memory_bytes`` so far is of the fullest GPU, or of the largest process on a CPU.
    """

    number: int
    stage: int
    objective: str
    loss: float
    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float = field(compare=False)
    peak_memory_bytes: int = field(compare=False)

    def titled_losses(self) -> dict[str, float]:
        """What the stage measured, by what people call it."""
        return {title: self.losses[name] for name, title in LOSSES.items() if name in self.losses}

    def as_json(self) -> dict[str, Any]:
        """Everything, each loss a field of its own."""
        content = asdict(self)
        losses: dict[str, float] = content.pop("losses")
        return {**content, **losses}


@dataclass(frozen=True)
class Progress:
    """The last step, and how the run is getting on; ``tokens_per_second`` of all processes."""

    step: Step
    num_stages: int
    num_steps: int
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run; ``seconds`` and ``tokens_per_second`` are since it began or was resumed.

    bad_rows: those of the data that were skipped. run: what it belongs to (identity.py). notes:
    what is to know of how it was gone on with. finished_before: whether all of it was there
    already, so that nothing was done.
    """

    checkpoint: str
    teacher: str | None
    out: Path
    device: str
    num_processes: int
    dtype: str
    num_trained: int
    resumed_at: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    bad_rows: BadRows
    steps: list[Step]
    run: Run
    notes: list[str]
    finished_before: bool = False

    def table(self) -> Any:
        """The loss curve at about ten steps."""
        from rich import box

        from hysparse_cli.tables import Table

        table = Table(
            title=f"{self.checkpoint} → {self.out}", caption=self._caption(), box=box.SIMPLE_HEAD
        )
        shown, many_stages = self._shown(), self.steps[-1].stage > 1
        measured = {title for step in self.steps for title in step.titled_losses()}
        titles = [title for title in LOSSES.values() if title in measured]
        stage = ["stage"] if many_stages else []
        for column in ("step", *stage, *titles, "learning rate", "gradient norm"):
            table.add_column(column, justify="right")
        for step in shown:
            losses = step.titled_losses()
            table.add_row(
                str(step.number),
                *([f"{step.stage} {step.objective}"] if many_stages else []),
                *(f"{losses[title]:.4f}" if title in losses else "" for title in titles),
                f"{step.learning_rate:.1e}",
                f"{step.gradient_norm:.2f}",
            )
        return table

    def as_json(self) -> dict[str, Any]:
        """Everything, with the losses of every step."""
        content = asdict(self) | {"out": str(self.out), "skipped_rows": self.bad_rows.as_json()}
        content["steps"] = [step.as_json() for step in self.steps]
        del content["bad_rows"]
        tokens = sum(step.tokens for step in self.steps)
        return {"schema": SCHEMA, "tokens": tokens, **content}

    def _shown(self) -> list[Step]:
        last = len(self.steps) - 1
        shown = {round(i * last / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)}
        return [self.steps[i] for i in sorted(shown)]

    def _caption(self) -> str:
        tokens = sum(step.tokens for step in self.steps)
        teacher = f", teacher {self.teacher}" if self.teacher else ""
        skipped = f", {self.bad_rows.count:,} bad rows skipped" if self.bad_rows.count else ""
        many = f" in {self.num_processes} processes" if self.num_processes > 1 else ""
        notes = "".join(f"\n{note}" for note in self.notes)
        return (
            f"{tokens:,} tokens, {self.num_trained:,} parameters in {self.dtype}{teacher}"
            f"{skipped}; "
            f"{self.tokens_per_second:,.0f} tokens/s on {self.device}{many}, "
            f"{format_bytes(self.peak_memory_bytes)} at most{notes}"
        )
