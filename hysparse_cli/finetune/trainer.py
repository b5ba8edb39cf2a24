"""Trains stage after stage, in one process or in many."""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_wsd_schedule

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.finetune.begin import Start
from hysparse_cli.finetune.data import PackedRows, Row, own_batches, rows_of_step
from hysparse_cli.finetune.distributed import World
from hysparse_cli.finetune.losses import count_targets
from hysparse_cli.finetune.result import Progress, Step
from hysparse_cli.finetune.sharding import ObjectiveModule, train_only
from hysparse_cli.finetune.state import read_facts, read_tensors, restore_rng, save_state
from hysparse_cli.finetune.trainable import decay_groups
from hysparse_cli.finetune.watchdog import Watchdog
from hysparse_cli.recipe.finetune import Stage


class Trainer:
    """Everything that changes from step to step.

    Args:
        module: the sharded model and its teacher.
        trained: what any stage trains, by name, float32.
        rows: the data; every process reads all of it.
        start: with the stages to run.
    """

    def __init__(
        self,
        module: ObjectiveModule,
        trained: dict[str, nn.Parameter],
        rows: PackedRows,
        start: Start,
        world: World,
    ):
        self.module, self.trained, self.rows = module, trained, rows
        self.start, self.options, self.world = start, start.options, world
        self.stages = self.options.resolved_stages()
        self.ends = list(accumulate(stage.steps for stage in self.stages))
        self.rows_of_step = rows_of_step(self.options, world.size)
        self.history: list[Step] = []
        self.watchdog = Watchdog(self.options)
        self._begin_stage(0, {})

    def run(self, out: Path, on_step: Callable[[Progress], None]) -> float:
        """Train to the last step, saving state as the options say; returns the seconds it took.

        Raises: QualityGateFailed where the loss or the gradient goes wrong; UnreadableInput where
            the data is no good; OutOfResources where the disk is full while saving.
        """
        begun, first = time.perf_counter(), len(self.history)
        self.module.model.train()
        rows = iter(self.rows)
        while (done := len(self.history)) < self.ends[-1]:
            if done == self.ends[self.stage]:
                self._begin_stage(self.stage + 1, self.optimizer.state)
            self.history.append(self._step(rows))
            seconds = time.perf_counter() - begun
            on_step(self._progress(seconds, first))
            every = self.options.steps_between_saves
            if every and ((done + 1) % every == 0 or done + 1 == self.ends[-1]):
                self._save(out)
        self.module.model.eval()
        return time.perf_counter() - begun

    def resume(self, saved: Path) -> None:
        """Go on from the state in ``saved``.

        Raises: as ``read_facts`` and ``read_tensors`` do.
        """
        facts = read_facts(saved)
        self.rows.load_state_dict(facts["rows"])
        self.history = [Step(**step) for step in facts["history"]]
        self.watchdog = Watchdog(self.options, self.history)
        self._begin_stage(facts["stage"], {})
        for name, count in facts["updates"].items():
            weight = self.trained[name]
            self.optimizer.state[weight] = {
                "step": torch.tensor(count, device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        read_tensors(saved, self._tensors(facts["trained"]))
        restore_rng(facts, self.world)

    def _begin_stage(self, number: int, moments: Mapping[Tensor, Any]) -> None:
        """The stage's schedule, where its steps so far have led it; data and ``moments`` of the
        weights that are trained go on."""
        self.stage = number
        done = len(self.history) - (self.ends[number - 1] if number else 0)
        stage, options = self.stages[number], self.options
        parameters = train_only(self.module, stage.trainable)
        groups = decay_groups(parameters, options.weight_decay)
        self.optimizer = torch.optim.AdamW(
            [group | {"initial_lr": stage.learning_rate} for group in groups],
            lr=stage.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            fused=True,  # else one operation after the other for each sharded weight
        )
        for weight in parameters.values():
            if weight in moments:
                self.optimizer.state[weight] = moments[weight]
        self.schedule = get_wsd_schedule(
            self.optimizer,
            num_warmup_steps=stage.warmup_steps,
            num_decay_steps=stage.decay_steps,
            num_training_steps=stage.steps + 1,
            last_epoch=done,  # its first step has learning rate 0: leave it out
        )

    def _step(self, stream: Iterator[Row]) -> Step:
        stage, world, begun = self.stages[self.stage], self.world, time.perf_counter()
        rows = list(islice(stream, self.rows_of_step))
        tokens = sum(count_targets(_alone(row)) for row in rows)
        if not tokens:
            raise UnreadableInput(
                f"data {self.options.data}: no token has another before it in its document, so "
                "that nothing can be predicted: give longer documents"
            )
        sums: dict[str, Tensor] = {}  # the same names in each process
        size = self.options.sequence_parallel_size
        rank, ranks = world.rank // size, world.size // size
        for batch in own_batches(rows, rank, ranks, self.options.batch_size):
            for name, value in self._backward(batch, stage, world.size / tokens).items():
                sums[name] = sums[name] + value if name in sums else value
        local = torch.stack(list(sums.values())).double()
        found = world.gathered(torch.cat((local, self._peak_memory())))
        losses = dict(zip(sums, (found[:, :-1].sum(0) / tokens).tolist(), strict=True))
        norm = self._clip()
        step = Step(
            number=len(self.history) + 1,
            stage=self.stage + 1,
            objective=stage.objective,
            loss=losses.pop("loss"),
            losses=losses,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            gradient_norm=norm,
            tokens=tokens,
            seconds=time.perf_counter() - begun,
            peak_memory_bytes=int(found[:, -1].max()),
        )
        self.watchdog.see(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return step

    def _backward(self, batch: Row, stage: Stage, scale: float) -> dict[str, Tensor]:
        """Add a batch's gradient; returns the sums that were measured.

        Args:
            scale: of the loss. FSDP2 takes the mean over the processes, hence times their number.
        """
        on_device = {name: tensor.to(self.world.device) for name, tensor in batch.items()}
        total, sums = self.module(on_device, stage)
        (total * scale).backward()
        return dict(sums)

    def _clip(self) -> float:
        """The norm of the gradient, which is no longer than ``max_grad_norm`` afterwards."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        norm = nn.utils.clip_grad_norm_(weights, self.options.max_grad_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _progress(self, seconds: float, first: int) -> Progress:
        done = len(self.history)
        tokens = sum(step.tokens for step in self.history[first:])
        left = seconds / (done - first) * (self.ends[-1] - done)
        return Progress(self.history[-1], len(self.stages), self.ends[-1], tokens / seconds, left)

    def _peak_memory(self) -> Tensor:
        """(1,) bytes: of the device where it is a GPU, else of the process."""
        if self.world.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return torch.tensor([peak], dtype=torch.float64, device=self.world.device)

    def _tensors(self, trained: Iterable[str]) -> dict[str, Any]:
        """What is sharded of the state, as it stands; reading it back fills it in place.

        Args:
            trained: names of weights; a further stage may train more than were saved.
        """
        moments = {
            name: {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
            for name, state in self._moments().items()
        }
        weights = {name: self.trained[name].detach() for name in trained}
        return {"weights": weights, "optimizer": moments}

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimiser's state of each weight that had a gradient."""
        found = {name: self.optimizer.state.get(weight) for name, weight in self.trained.items()}
        return {name: state for name, state in found.items() if state}

    def _save(self, out: Path) -> None:
        facts = {
            **self.start.facts,
            "run": asdict(self.start.run),
            "stage": self.stage,
            "trained": list(self.trained),
            "updates": {name: float(state["step"]) for name, state in self._moments().items()},
            "rows": self.rows.state_dict(),
            "history": [asdict(step) for step in self.history],
        }
        save_state(out, len(self.history), self._tensors(self.trained), facts, self.world)


def _alone(row: Row) -> Row:
    return {name: tensor[None] for name, tensor in row.items()}
