"""What a finetuning run reports: each step as it happens, and the whole at the end."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHOWN_STEPS = 10


@dataclass(frozen=True)
class Step:
    """One optimiser step. Losses are in nats per token; ``number`` counts from 1.

    ``loss`` is what is minimised, ``distill_loss`` is KL(teacher || model), None without a teacher.
    ``tokens`` are those that were predicted.
    """

    number: int
    loss: float
    next_token_loss: float
    distill_loss: float | None
    learning_rate: float
    gradient_norm: float
    tokens: int


@dataclass(frozen=True)
class Progress:
    """The last step, and how the run is getting on."""

    step: Step
    num_steps: int
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run; ``seconds`` and ``tokens_per_second`` are of this process alone."""

    checkpoint: str
    teacher: str | None
    out: Path
    device: str
    dtype: str
    num_trained: int
    resumed_at: int
    seconds: float
    tokens_per_second: float
    steps: list[Step]

    def table(self) -> Any:
        """The loss curve at about ten steps."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=f"{self.checkpoint} → {self.out}", caption=self._caption(), box=box.SIMPLE_HEAD
        )
        columns = ["step", "next-token loss", "learning rate", "gradient norm"]
        if self.teacher:
            columns.insert(2, "KL to teacher")
        for column in columns:
            table.add_column(column, justify="right")
        for step in self._shown():
            cells = [
                str(step.number),
                f"{step.next_token_loss:.4f}",
                f"{step.learning_rate:.1e}",
                f"{step.gradient_norm:.2f}",
            ]
            if step.distill_loss is not None:
                cells.insert(2, f"{step.distill_loss:.4f}")
            table.add_row(*cells)
        return table

    def as_json(self) -> dict[str, Any]:
        """Everything, with the loss of every step."""
        content = asdict(self) | {"out": str(self.out)}
        tokens = sum(step.tokens for step in self.steps)
        return {"schema": "hysparse.finetune/1", "tokens": tokens, **content}

    def _shown(self) -> list[Step]:
        last = len(self.steps) - 1
        shown = {round(i * last / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)}
        return [self.steps[i] for i in sorted(shown)]

    def _caption(self) -> str:
        tokens = sum(step.tokens for step in self.steps)
        teacher = f", teacher {self.teacher}" if self.teacher else ""
        return (
            f"{tokens:,} tokens, {self.num_trained:,} parameters in {self.dtype}{teacher}; "
            f"{self.tokens_per_second:,.0f} tokens/s on {self.device}"
        )
