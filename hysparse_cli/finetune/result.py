"""What a finetuning run reports: each step as it happens, and the whole at the end."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hysparse_cli.finetune.identity import Run
from hysparse_cli.texts.documents import BadRows

SCHEMA = "hysparse.finetune/3"
SHOWN_STEPS = 10
PARTS = {
    "next_token_loss": "next-token loss",
    "distill_loss": "KL to teacher",
    "align_loss": "attention error",
    "hidden_loss": "hidden state error",
}


@dataclass(frozen=True)
class Step:
    """One optimiser step. ``number`` counts from 1 over all stages, ``stage`` from 1.

    ``loss`` is what is minimised, per predicted token. ``next_token_loss`` and ``distill_loss``,
    KL(teacher || model), are in nats, ``align_loss`` and ``hidden_loss`` are relative squared
    errors; each is 0 where the stage does not measure it. ``tokens`` are those that were predicted.
    ``seconds`` are this step's, from reading its data to its update. ``peak_memory_bytes`` so far
    is of the fullest GPU, or of the largest process on a CPU.
    """

    number: int
    stage: int
    objective: str
    loss: float
    next_token_loss: float
    distill_loss: float
    align_loss: float
    hidden_loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float = field(compare=False)
    peak_memory_bytes: int = field(compare=False)

    def parts(self) -> dict[str, float]:
        """The parts of the loss that the stage measures, by what people call them."""
        return {name: value for key, name in PARTS.items() if (value := getattr(self, key))}


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
        measured = {name for step in self.steps for name in step.parts()}
        parts = [name for name in PARTS.values() if name in measured]
        stage = ["stage"] if many_stages else []
        for column in ("step", *stage, *parts, "learning rate", "gradient norm"):
            table.add_column(column, justify="right")
        for step in shown:
            losses = step.parts()
            table.add_row(
                str(step.number),
                *([f"{step.stage} {step.objective}"] if many_stages else []),
                *(f"{losses[name]:.4f}" if name in losses else "" for name in parts),
                f"{step.learning_rate:.1e}",
                f"{step.gradient_norm:.2f}",
            )
        return table

    def as_json(self) -> dict[str, Any]:
        """Everything, with the loss of every step."""
        content = asdict(self) | {"out": str(self.out), "skipped_rows": self.bad_rows.as_json()}
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
            f"{self.peak_memory_bytes / 1e9:.2f} GB at most{notes}"
        )
