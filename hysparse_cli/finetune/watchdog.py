"""Stops a run that went wrong: a loss that is not finite, or that has risen and stays up."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from statistics import median

from hysparse_cli.errors import QualityGateFailed
from hysparse_cli.finetune.result import Step
from hysparse_cli.recipe import FinetuneOptions

LOST = 0.5  # of what the loss has fallen by since the stage's start
RISEN = 0.1  # of the best loss
SURE = 7.0  # standard errors


class Watchdog:
    """Sees every step and raises where going on is a waste.

    A loss has risen where its median over the last ``stop_when_rising_steps`` steps is above the
    best such median of the stage by half of what the loss had fallen by, by a tenth at least, and
    by more than noise explains. So a few bad batches don't count, nor that a stage begins where
    another objective ended.

    Args:
        history: the steps so far of a run that goes on.
    """

    def __init__(self, options: FinetuneOptions, history: Sequence[Step] = ()):
        stages = options.resolved_stages()
        self._rates = [stage.learning_rate for stage in stages]
        self._ends = list(accumulate(stage.steps for stage in stages))
        self._window = options.stop_when_rising_steps
        self._stage = -1
        self._losses: list[float] = []
        self._medians: list[float] = []
        for step in history:
            self._take(step)

    def see(self, step: Step) -> None:
        """Take in a step that was just made.

        Raises: QualityGateFailed where its loss or gradient is not finite, or the loss has risen.
        """
        self._take(step)
        for what, value in (("loss", step.loss), ("gradient norm", step.gradient_norm)):
            if not math.isfinite(value):
                raise QualityGateFailed(
                    f"step {step.number}: the {what} is {value}, so the run stops and writes no "
                    f"checkpoint: lower finetune.learning_rate ({self._rates[self._stage]}) or "
                    "check the checkpoint for NaN"
                )
        if self._window is None or not self._medians:
            return
        now, best, first = self._medians[-1], min(self._medians), self._medians[0]
        if now - best > max(LOST * (first - best), RISEN * best, self._noise()):
            at = step.number - len(self._medians) + 1 + self._medians.index(best)
            raise QualityGateFailed(
                f"step {step.number}: the loss has risen to {now:.4g} from {best:.4g} at step "
                f"{at} (medians of {self._window} steps), so the run stops and writes no "
                f"checkpoint: lower finetune.learning_rate ({self._rates[self._stage]}) or "
                "max_grad_norm; stop_when_rising_steps: null goes on regardless"
            )

    def _noise(self) -> float:
        """What the largest and the smallest of many medians differ by where losses only scatter.

        From the differences of successive losses, whose median is 0.954 standard deviations of a
        loss where it is normal; a median of n has a standard error of 1.25 of them / sqrt(n).
        """
        differences = [abs(b - a) for a, b in pairwise(self._losses)]
        deviation = median(differences) / 0.954 if differences else 0.0
        return SURE * 1.25 * deviation / math.sqrt(self._window or 1)

    def _take(self, step: Step) -> None:
        stage = sum(step.number > end for end in self._ends[:-1])
        if stage != self._stage:
            self._stage, self._losses, self._medians = stage, [], []
        self._losses.append(step.loss)
        if self._window is not None and len(self._losses) >= self._window:
            self._medians.append(median(self._losses[-self._window :]))
