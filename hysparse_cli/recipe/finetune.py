"""Options of ``hysparse finetune``."""

from itertools import accumulate, pairwise
from math import ceil
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from hysparse_cli.recipe.fields import (
    Beta,
    Device,
    Dtype,
    FilePath,
    Fraction,
    ModelName,
    Positive,
    Real,
    Section,
    Seed,
)

Objective = Literal["align", "distill", "train"]
Trainable = Literal["all", "attention", "sparse-attention", "new"]
Rate = Annotated[Real, Field(gt=0)]
Weight = Annotated[Real, Field(ge=0)]
Steps = Annotated[int, Field(ge=0)]

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


StepsOrOff = Annotated[int | Literal["off"], BeforeValidator(_steps_or_off)]


class StageOptions(Section):
    """One stage of healing; a field that is None is what ``finetune`` says.

    ``objective``: "align" each sparse layer's attention output with the teacher's, fed the
    teacher's inputs; "distill" the teacher's logits; "train" on the next token. What "align" trains
    is "sparse-attention" unless the stage says otherwise.
    """

    objective: Objective
    steps: Positive
    learning_rate: Rate | None = None
    warmup_steps: Steps | None = None
    decay_fraction: Fraction | None = None
    trainable: Trainable | None = None
    distill_weight: Fraction | None = None
    hidden_weight: Weight | None = None

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
    warmup_steps: Steps
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
    where there is a teacher, else "train". With stages, ``steps`` makes them so long in all, each
    in proportion. A step reads ``batch_size`` rows ``gradient_accumulation`` times. The learning
    rate warms up for ``warmup_steps`` (a tenth of the steps by default), stays, and decays over the
    last ``decay_fraction`` of the steps, in each stage anew.

    "distill" minimises ``distill_weight`` KL to the teacher + (1 - ``distill_weight``) next-token
    loss + ``hidden_weight`` the relative squared error of the hidden states, mean over the layers.

    ``data`` is a file (see documents/), or "hub:" and the name of a data set, of which
    ``data_subset`` and ``data_split`` are read. A file is read once before training, so that a bad
    row costs no run; ``skip_bad_rows`` counts such rows instead of refusing them. ``lora_rank``
    trains low-rank adapters of the attention projections instead of the weights.
    ``stop_when_rising_steps``: see watchdog.py.

    State is saved in OUT.state every ``save_every_steps`` steps, by default every tenth of the run
    but no more often than every 10 steps, with "off" never; ``resume`` is "auto" (from there if
    there is any, else from the start) or a state's folder. ``keep_state`` leaves the last state
    there when OUT is written: with more ``steps``, or further ``stages``, a finished run then goes
    on. ``log_to`` writes scalars to OUT.logs or W&B. ``nproc_per_node`` processes share each step's
    rows; with ``sequence_parallel_size`` so many of them split the tokens of each row, and the KV
    heads in attention.
    """

    data: FilePath | None = None
    data_subset: str | None = None
    data_split: str = "train"
    text_field: str = "text"
    skip_bad_rows: bool = False
    stages: list[StageOptions] = []
    steps: Positive | None = None
    batch_size: Positive = 8
    gradient_accumulation: Positive = 1
    sequence_tokens: Annotated[int, Field(gt=1)] = 1024
    shuffle_rows: Positive = 256
    learning_rate: Rate = 3e-4
    warmup_steps: Steps | None = None
    decay_fraction: Fraction = 0.2
    weight_decay: Weight = 0.1
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.95
    adam_epsilon: Annotated[Real, Field(gt=0)] = 1e-10
    max_grad_norm: Annotated[Real, Field(gt=0)] = 1.0
    teacher: ModelName | None = None
    distill_weight: Fraction = 1.0
    hidden_weight: Weight = 0.0
    trainable: Trainable = "all"
    lora_rank: Positive | None = None
    lora_alpha: Positive | None = None
    gradient_checkpointing: bool = False
    stop_when_rising_steps: Positive | None = 100
    save_every_steps: StepsOrOff | None = None
    keep_state: bool = False
    resume: FilePath | None = None
    log_to: Literal["tensorboard", "wandb"] | None = None
    nproc_per_node: Positive | None = None
    sequence_parallel_size: Positive = 1
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: bool = False
    seed: Seed = 0
    overwrite: bool = False

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
