"""The training loop, in one process."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import get_wsd_schedule

from hysparse_cli.errors import QualityGateFailed, UnreadableInput
from hysparse_cli.finetune.data import PackedRows, Row, batches
from hysparse_cli.finetune.losses import LossSums, count_targets, loss_sums
from hysparse_cli.finetune.result import Progress, Step
from hysparse_cli.finetune.state import State, restore_rng, run_of, save_state
from hysparse_cli.finetune.weights import MasterWeights
from hysparse_cli.recipe import FinetuneOptions


class Trainer:
    """Everything that changes from step to step.

    Args:
        parameters: what is trained, by name; of ``model``, which is on its device.
        teacher: the model to distill from, on the same device, or None.
        rows: the data.
    """

    def __init__(
        self,
        model: Any,
        parameters: dict[str, nn.Parameter],
        teacher: Any | None,
        rows: PackedRows,
        options: FinetuneOptions,
    ):
        self.model, self.teacher, self.rows, self.options = model, teacher, rows, options
        self.weights = MasterWeights(parameters)
        groups = self.weights.groups(options.weight_decay)
        self.optimizer = torch.optim.AdamW(
            [group | {"initial_lr": options.learning_rate} for group in groups],
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
        )
        self.schedule = get_wsd_schedule(
            self.optimizer,
            num_warmup_steps=options.warmup,
            num_decay_steps=options.decay,
            num_training_steps=options.steps + 1,
            last_epoch=0,  # its first step has learning rate 0: leave it out
        )
        self.history: list[Step] = []

    def run(self, out: Path, checkpoint: Path, on_step: Callable[[Progress], None]) -> float:
        """Train to the last step, saving state as the options say; returns the seconds it took.

        Raises: QualityGateFailed where the loss or the gradient is not finite; UnreadableInput
            where the data is no good; OutOfResources where the disk is full while saving.
        """
        options, begun, first = self.options, time.perf_counter(), len(self.history)
        self.model.train()
        stream = batches(self.rows, options.batch_size)
        while len(self.history) < options.steps:
            self.history.append(self._step(stream))
            done = len(self.history)
            seconds = time.perf_counter() - begun
            tokens = sum(step.tokens for step in self.history[first:])
            left = seconds / (done - first) * (options.steps - done)
            on_step(Progress(self.history[-1], options.steps, tokens / seconds, left))
            every = options.save_every_steps
            if every and (done % every == 0 or done == options.steps):
                save_state(out, self._state(checkpoint))
        self.model.eval()
        return time.perf_counter() - begun

    def resume(self, state: State) -> None:
        """Go on from ``state``."""
        self.weights.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.rows.load_state_dict(state["rows"])
        self.history = [Step(**step) for step in state["history"]]
        restore_rng(state)

    def _state(self, checkpoint: Path) -> State:
        return {
            "step": len(self.history),
            "run": run_of(checkpoint, self.options),
            "weights": self.weights.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rows": self.rows.state_dict(),
            "history": [asdict(step) for step in self.history],
        }

    def _step(self, stream: Iterator[Row]) -> Step:
        options = self.options
        group = [next(stream) for _ in range(options.gradient_accumulation)]
        tokens = sum(count_targets(batch) for batch in group)
        if not tokens:
            raise UnreadableInput(
                f"data {options.data}: no token has another before it in its document, so that "
                "nothing can be predicted: give longer documents"
            )
        next_token = distill = loss = 0.0
        for batch in group:
            sums = self._backward(batch, tokens)
            next_token += sums.next_token.item() / tokens
            distill += sums.distill.item() / tokens
            loss += sums.mixed(self._distill_weight).item() / tokens
        self._require_finite("loss", loss)
        masters = self.weights.masters.values()
        norm = float(nn.utils.clip_grad_norm_(masters, options.max_grad_norm))
        self._require_finite("gradient norm", norm)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.weights.publish()
        number = len(self.history) + 1
        kl = distill if self.teacher is not None else None
        return Step(number, loss, next_token, kl, learning_rate, norm, tokens)

    def _backward(self, batch: Row, tokens: int) -> LossSums:
        on_device = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        sums = loss_sums(self.model, on_device, self.teacher)
        torch.autograd.backward(sums.mixed(self._distill_weight) / tokens)
        self.weights.take_gradients()
        return sums

    @property
    def _distill_weight(self) -> float:
        return self.options.distill_weight if self.teacher is not None else 0.0

    def _require_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        raise QualityGateFailed(
            f"step {len(self.history) + 1}: the {what} is {value}, so the run stops and writes no "
            f"checkpoint: lower finetune.learning_rate ({self.options.learning_rate}) or check the "
            "checkpoint for NaN"
        )
