"""Options of ``hysparse finetune``."""

from itertools import accumulate, pairwise
from math import ceil
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from hysparse_cli.recipe.fields import (
    TEXT_FILE,
    Beta,
    Count,
    Device,
    Dtype,
    FilePath,
    Flag,
    Fraction,
    Help,
    ModelName,
    Overwrite,
    Positive,
    Real,
    Section,
    Seed,
    SeveralTokens,
    SkipBadRows,
    Text,
    TextField,
    TrustRemoteCode,
)

Objective = Literal["align", "distill", "train"]
Trainable = Literal["all", "attention", "sparse-attention", "new"]
Rate = Annotated[Real, Field(gt=0)]
Weight = Annotated[Real, Field(ge=0)]

DEFAULT_STEPS = 200
DEFAULT_SAVES, FEWEST_STEPS_BETWEEN = 10, 10  # of a run's state


def _steps_or_off(value: object) -> object:
    """YAML reads ``off`` as False, and a flag is text."""
    if value is False or value == "off":
        return "off"
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError("neither a number of steps, 1 or more, nor off")
    return number


StepsOrOff = Annotated[int | Literal["off"], Text("steps"), BeforeValidator(_steps_or_off)]


class StageOptions(Section):
    """One stage of healing; what it does not give is what the section ``finetune`` says.

    "align" brings each sparse layer's attention output near the teacher's, fed the teacher's
    inputs; "distill" fits the teacher's logits, "train" the next token.
    """

    objective: Annotated[Objective, Help("What the stage does:")]
    steps: Annotated[Positive, Help("Optimiser steps.")]
    learning_rate: Annotated[Rate | None, Help("Largest learning rate.", "the section's")] = None
    warmup_steps: Annotated[
        Count | None, Help("Steps until the learning rate is reached.", "the section's")
    ] = None
    decay_fraction: Annotated[
        Fraction | None, Help("Part of the steps in which it decays.", "the section's")
    ] = None
    trainable: Annotated[
        Trainable | None,
        Help("What is trained:", "the section's; sparse-attention or new for align"),
    ] = None
    distill_weight: Annotated[
        Fraction | None, Help("Weight of the teacher's logits, for distill.", "the section's")
    ] = None
    hidden_weight: Annotated[
        Weight | None, Help("Weight of the hidden states' error, for distill.", "the section's")
    ] = None

    @model_validator(mode="after")
    def _of_its_objective(self) -> "StageOptions":
        given = [n for n in ("distill_weight", "hidden_weight") if getattr(self, n) is not None]
        if given and self.objective != "distill":
            raise ValueError(
                f"objective {self.objective} takes no {' and no '.join(given)}: leave that out"
            )
        return self


class Stage(StageOptions):
    """A stage with every field filled in: what the trainer runs."""

    learning_rate: Rate
    warmup_steps: Count
    decay_fraction: Fraction
    trainable: Trainable
    distill_weight: Fraction
    hidden_weight: Weight

    @property
    def decay_steps(self) -> int:
        return round(self.steps * self.decay_fraction)

    @property
    def needs_teacher(self) -> bool:
        return self.objective != "train"

    def as_options(self) -> StageOptions:
        """The stage in a recipe's ``stages``, which resolves to it."""
        others = set() if self.objective == "distill" else {"distill_weight", "hidden_weight"}
        return StageOptions(**self.model_dump(exclude=others))

    def problems(self, name: str) -> list[str]:
        """What can't be carried out, a line each, beginning with ``name``."""
        found = []
        if self.warmup_steps + self.decay_steps > self.steps:
            found.append(
                f"warmup_steps {self.warmup_steps} and decay_fraction {self.decay_fraction} "
                f"({self.decay_steps} steps) are together more than steps {self.steps}"
            )
        if self.objective == "align" and self.trainable in ("all", "attention"):
            found.append(
                f"trainable {self.trainable} would change full layers, which nothing holds to the "
                "teacher while aligning: use sparse-attention or new"
            )
        if self.objective == "distill" and not (self.distill_weight or self.hidden_weight):
            found.append(
                "distill_weight and hidden_weight are both 0, which distills nothing: use "
                "objective train"
            )
        return [f"{name}{problem}" for problem in found]


class FinetuneOptions(Section):
    """``hysparse finetune``: next-token loss, or with ``teacher`` distillation mixed in.

    ``stages`` run one after the other; without them there is one, of ``steps`` steps: "distill"
    where there is a teacher, else "train". The learning rate warms up, stays, and decays, in each
    stage anew. "distill" minimises ``distill_weight`` KL to the teacher + (1 - ``distill_weight``)
    next-token loss + ``hidden_weight`` the relative squared error of the hidden states, mean over
    the layers. A step reads ``batch_size`` rows ``gradient_accumulation`` times. A file of ``data``
    is read once before training, so that a bad row costs no run. With ``keep_state`` and more
    ``steps``, or further ``stages``, a finished run goes on.
    """

    data: Annotated[FilePath | None, Flag(f"{TEXT_FILE}, or hub:NAME, a data set.")] = None
    data_subset: Annotated[str | None, Help("Subset of a data set of the hub.")] = None
    data_split: Annotated[str, Help("Split of a data set of the hub.")] = "train"
    text_field: TextField = "text"
    skip_bad_rows: SkipBadRows = False
    teacher: Annotated[ModelName | None, Flag("A dense checkpoint to distill from.", "none")] = None
    stages: Annotated[
        list[StageOptions], Help("Stages of healing, one after the other.", "one stage")
    ] = []
    steps: Annotated[
        Positive | None, Flag("Optimiser steps; with stages: of all together.", "200")
    ] = None
    batch_size: Annotated[Positive, Flag("Rows read at once.")] = 8
    gradient_accumulation: Annotated[Positive, Help("Batches in a step.")] = 1
    sequence_tokens: Annotated[SeveralTokens, Flag("Tokens in a row.")] = 1024
    shuffle_rows: Annotated[Positive, Help("Rows among which the next one is drawn.")] = 256
    learning_rate: Annotated[Rate, Flag("Largest learning rate.")] = 3e-4
    warmup_steps: Annotated[
        Count | None,
        Help("Steps until the learning rate is reached.", "a tenth of the stage"),
    ] = None
    decay_fraction: Annotated[
        Fraction, Help("Part of the steps, the last, in which the learning rate decays.")
    ] = 0.2
    weight_decay: Annotated[Weight, Help("AdamW's weight decay.")] = 0.1
    adam_beta1: Annotated[Beta, Help("AdamW's decay of the mean of gradients.")] = 0.9
    adam_beta2: Annotated[Beta, Help("AdamW's decay of the mean of their squares.")] = 0.95
    adam_epsilon: Annotated[Real, Field(gt=0), Help("AdamW's addition to the denominator.")] = 1e-10
    max_grad_norm: Annotated[Real, Field(gt=0), Help("Norm that the gradient is clipped to.")] = 1.0
    distill_weight: Annotated[Fraction, Help("Weight of the teacher's logits.")] = 1.0
    hidden_weight: Annotated[Weight, Help("Weight of the hidden states' error.")] = 0.0
    trainable: Annotated[Trainable, Flag("What is trained:")] = "all"
    lora_rank: Annotated[
        Positive | None,
        Help("Rank of low-rank adapters, trained instead of attention's weights.", "none"),
    ] = None
    lora_alpha: Annotated[Positive | None, Help("Scale of the adapters.", "2 x lora_rank")] = None
    gradient_checkpointing: Annotated[bool, Help("Compute activations twice.")] = False
    stop_when_rising_steps: Annotated[
        Positive | None,
        Help("Stop where the loss has risen and stays up for so many steps; null: never."),
    ] = 100
    save_every_steps: Annotated[
        StepsOrOff | None, Flag("Keep the run's state in OUT.state; or off.", "each tenth")
    ] = None
    keep_state: Annotated[bool, Flag("Leave the last state, to add steps to a finished run.")] = (
        False
    )
    resume: Annotated[
        FilePath | None,
        Flag("auto: go on where OUT.state has state; or the folder of a state."),
    ] = None
    nproc_per_node: Annotated[
        Positive | None, Flag("Start so many processes, one for each GPU.", "1")
    ] = None
    sequence_parallel_size: Annotated[
        Positive, Help("Processes that share the tokens of a row, and the KV heads in attention.")
    ] = 1
    log_to: Annotated[
        Literal["tensorboard", "wandb"] | None, Flag("Write scalars to OUT.logs, or to W&B:")
    ] = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
    overwrite: Overwrite = False
    seed: Seed = 0

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages together."""
        return sum(stage.steps for stage in self.resolved_stages())

    @property
    def steps_between_saves(self) -> int | None:
        """How often state is saved; None is never."""
        if self.save_every_steps == "off":
            return None
        tenth = ceil(self.total_steps / DEFAULT_SAVES)
        return self.save_every_steps or max(FEWEST_STEPS_BETWEEN, tenth)

    def resolved_stages(self) -> list[Stage]:
        """The stages to run, each with every field filled in and as long as it will be."""
        if not self.stages:
            only = self._only_stage()
            return [self._resolved(only, only.steps)]
        return [self._resolved(s, n) for s, n in zip(self.stages, self._lengths(), strict=True)]

    def further_stage(self, steps: int) -> Stage:
        """A stage of ``steps`` steps that is otherwise the last one once more."""
        return self._resolved(self.stages[-1] if self.stages else self._only_stage(), steps)

    def _only_stage(self) -> StageOptions:
        wants_teacher = self.distill_weight or self.hidden_weight
        objective: Objective = "distill" if self.teacher and wants_teacher else "train"
        return StageOptions(objective=objective, steps=self.steps or DEFAULT_STEPS)

    def _lengths(self) -> list[int]:
        """Steps of each stage; in proportion where ``steps`` says how many there are in all."""
        ends = [0, *accumulate(stage.steps for stage in self.stages)]
        total = self.steps or ends[-1]
        return [b - a for a, b in pairwise(round(end * total / ends[-1]) for end in ends)]

    def _resolved(self, stage: StageOptions, steps: int) -> Stage:
        given = stage.model_dump(exclude_none=True)
        defaults = {
            "learning_rate": self.learning_rate,
            "warmup_steps": steps // 10 if self.warmup_steps is None else self.warmup_steps,
            "decay_fraction": self.decay_fraction,
            "trainable": self._align_trains if stage.objective == "align" else self.trainable,
            "distill_weight": self.distill_weight if stage.objective == "distill" else 0.0,
            "hidden_weight": self.hidden_weight if stage.objective == "distill" else 0.0,
        }
        return Stage.model_construct(**(defaults | given | {"steps": steps}))

    @property
    def _align_trains(self) -> Trainable:
        return "new" if self.trainable == "new" else "sparse-attention"

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneOptions":
        problems = self._lora_problems()
        if self.sequence_tokens % self.sequence_parallel_size:
            problems.append(
                f"sequence_tokens {self.sequence_tokens} can't be split evenly by "
                f"sequence_parallel_size {self.sequence_parallel_size}: make it a multiple"
            )
        if self.stages and 0 in self._lengths():
            problems.append(f"steps {self.steps} are too few for {len(self.stages)} stages")
        else:
            for number, stage in enumerate(self.resolved_stages()):
                problems += stage.problems(f"stages.{number}: " if self.stages else "")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _lora_problems(self) -> list[str]:
        if self.lora_rank is None:
            return ["lora_alpha needs lora_rank"] if self.lora_alpha is not None else []
        if all(stage.trainable == "new" for stage in self.resolved_stages()):
            return ["lora_rank with trainable new: there is no projection to adapt, leave it out"]
        return []
