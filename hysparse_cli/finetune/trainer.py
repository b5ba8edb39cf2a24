"""The training loop, in one process."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_wsd_schedule

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.finetune.data import PackedRows, Row, batches
from hysparse_cli.finetune.losses import count_targets
from hysparse_cli.finetune.objectives import OBJECTIVES
from hysparse_cli.finetune.result import Progress, Step
from hysparse_cli.finetune.state import State, restore_rng, run_of, save_state
from hysparse_cli.finetune.watchdog import Watchdog
from hysparse_cli.finetune.weights import MasterWeights, select_trainable
from hysparse_cli.recipe import FinetuneOptions


class Trainer:
    """Everything that changes from step to step.

    Args:
        teacher: the model to distill from, on the same device, or None.
        rows: the data.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any | None,
        rows: PackedRows,
        options: FinetuneOptions,
    ):
        self.model, self.teacher, self.rows, self.options = model, teacher, rows, options
        self.stages = options.resolved_stages()
        self.history: list[Step] = []
        self.watchdog = Watchdog(options)
        self.at_stage = 0
        self._begin_stage()

    def _begin_stage(self) -> None:
        """Choose what is trained, with a new optimiser and schedule."""
        options, stage = self.options, self.stages[self.at_stage]
        self.weights = MasterWeights(select_trainable(self.model, stage.trainable))
        groups = self.weights.groups(options.weight_decay)
        self.optimizer = torch.optim.AdamW(
            [group | {"initial_lr": stage.learning_rate} for group in groups],
            lr=stage.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
        )
        self.schedule = get_wsd_schedule(
            self.optimizer,
            num_warmup_steps=stage.warmup_steps,
            num_decay_steps=stage.decay_steps,
            num_training_steps=stage.steps + 1,
            last_epoch=0,  # its first step has learning rate 0: leave it out
        )

    def run(self, out: Path, checkpoint: Path, on_step: Callable[[Progress], None]) -> float:
        """Train to the last step, saving state as the options say; returns the seconds it took.

        Raises: QualityGateFailed where the loss or the gradient is not finite; UnreadableInput
            where the data is no good; OutOfResources where the disk is full while saving.
        """
        options, begun, first = self.options, time.perf_counter(), len(self.history)
        self.model.train()
        stream = batches(self.rows, options.batch_size)
        total = sum(stage.steps for stage in self.stages)
        while len(self.history) < total:
            if len(self.history) == sum(stage.steps for stage in self.stages[: self.at_stage + 1]):
                self.at_stage += 1
                self._begin_stage()
            self.history.append(self._step(stream))
            self.watchdog.see(self.history[-1])
            done = len(self.history)
            seconds = time.perf_counter() - begun
            tokens = sum(step.tokens for step in self.history[first:])
            left = seconds / (done - first) * (total - done)
            on_step(Progress(self.history[-1], total, tokens / seconds, left))
            every = options.save_every_steps
            if every and (done % every == 0 or done == total):
                save_state(out, self._state(checkpoint))
        self.model.eval()
        return time.perf_counter() - begun

    def resume(self, state: State) -> None:
        """Go on from ``state``."""
        self.at_stage = state["stage"]
        self.model.load_state_dict(state["before"], strict=False)
        self._begin_stage()
        self.weights.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.rows.load_state_dict(state["rows"])
        self.history = [Step(**step) for step in state["history"]]
        self.watchdog = Watchdog(self.options, self.history)
        restore_rng(state)

    def _state(self, checkpoint: Path) -> State:
        return {
            "step": len(self.history),
            "run": run_of(checkpoint, self.options),
            "stage": self.at_stage,
            "before": self._trained_before(),
            "weights": self.weights.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rows": self.rows.state_dict(),
            "history": [asdict(step) for step in self.history],
        }

    def _trained_before(self) -> dict[str, Tensor]:
        """What earlier stages trained and this one does not."""
        if self.at_stage == 0:
            return {}
        state: dict[str, Tensor] = self.model.state_dict()
        return {name: state[name] for name in state if name not in self.weights.masters}

    def _step(self, stream: Iterator[Row]) -> Step:
        options = self.options
        group = [next(stream) for _ in range(options.gradient_accumulation)]
        tokens = sum(count_targets(batch) for batch in group)
        if not tokens:
            raise UnreadableInput(
                f"data {options.data}: no token has another before it in its document, so that "
                "nothing can be predicted: give longer documents"
            )
        sums = torch.stack([self._backward(batch, tokens) for batch in group]).sum(0) / tokens
        loss, next_token, distill, _align, _hidden = sums.tolist()
        masters = self.weights.masters.values()
        norm = float(nn.utils.clip_grad_norm_(masters, options.max_grad_norm))
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.weights.publish()
        number = len(self.history) + 1
        kl = distill if self.stages[self.at_stage].objective == "distill" else None
        return Step(number, loss, next_token, kl, learning_rate, norm, tokens)

    def _backward(self, batch: Row, tokens: int) -> Tensor:
        """(5,): the batch's ``LossSums``."""
        stage = self.stages[self.at_stage]
        on_device = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        sums = OBJECTIVES[stage.objective](self.model, on_device, self.teacher, stage)
        torch.autograd.backward(sums.total / tokens)
        self.weights.take_gradients()
        return torch.stack(sums).detach().double()
