"""Options of ``hysparse finetune``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hysparse_cli.recipe.fields import Beta, Device, Dtype, Fraction, Positive, Real, Section

Objective = Literal["align", "distill", "train"]
Trainable = Literal["all", "attention", "sparse-attention", "new"]
Rate = Annotated[Real, Field(gt=0)]
Weight = Annotated[Real, Field(ge=0)]


class StageOptions(Section):
    """One stage of healing; a field that is None is what ``finetune`` says.

    ``objective``: "align" each sparse layer's attention output with the teacher's, fed the
    teacher's inputs; "distill" the teacher's logits; "train" on the next token.
    """

    objective: Objective
    steps: Positive
    learning_rate: Rate | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    decay_fraction: Fraction | None = None
    trainable: Trainable | None = None
    distill_weight: Fraction | None = None
    hidden_weight: Weight | None = None


class FinetuneOptions(Section):
    """``hysparse finetune``: next-token loss, or with ``teacher`` distillation mixed in.

    ``stages`` run one after the other; without them there is one, of ``steps`` steps: "distill"
    where there is a teacher, else "train". A step reads ``batch_size`` rows
    ``gradient_accumulation`` times. The learning rate warms up for ``warmup_steps`` (a tenth of the
    steps by default), stays, and decays over the last ``decay_fraction`` of the steps.
    ``distill_weight`` 1 is distillation alone.
    """

    data: str | None = None
    text_field: str = "text"
    stages: list[StageOptions] = []
    steps: Positive = 200
    batch_size: Positive = 8
    gradient_accumulation: Positive = 1
    sequence_tokens: Annotated[int, Field(gt=1)] = 1024
    shuffle_rows: Positive = 256
    learning_rate: Annotated[Real, Field(gt=0)] = 3e-4
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    decay_fraction: Fraction = 0.2
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.95
    adam_epsilon: Annotated[Real, Field(gt=0)] = 1e-10
    max_grad_norm: Annotated[Real, Field(gt=0)] = 1.0
    teacher: str | None = None
    distill_weight: Fraction = 1.0
    trainable: Literal["all", "attention", "new"] = "all"
    gradient_checkpointing: bool = False
    save_every_steps: Positive | None = None
    resume: bool = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = 0
    overwrite: bool = False

    @property
    def warmup(self) -> int:
        """Steps of warmup."""
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps

    @property
    def decay(self) -> int:
        """Steps of decay."""
        return round(self.steps * self.decay_fraction)

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneOptions":
        if self.warmup + self.decay > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup} and decay_fraction {self.decay_fraction} "
                f"({self.decay} steps) are together more than steps {self.steps}"
            )
        return self
