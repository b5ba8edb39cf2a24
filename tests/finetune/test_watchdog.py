"""Runs that went wrong are stopped, and those that only look like it are not."""

import random
from collections.abc import Iterable

import pytest

from hysparse_cli.errors import QualityGateFailed
from hysparse_cli.finetune.result import Step
from hysparse_cli.finetune.watchdog import Watchdog
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.recipe.finetune import StageOptions


def steps_of(losses: Iterable[float], gradient_norm: float = 1.0) -> list[Step]:
    return [
        Step(n, 1, "train", loss, {"next_token_loss": loss}, 1e-3, gradient_norm, 100, 0.0, 0)
        for n, loss in enumerate(losses, start=1)
    ]


def stopped_at(losses: list[float], **options: object) -> int | None:
    """The step that the run is stopped at; resuming it anywhere before must not change that."""
    fields = {"stop_when_rising_steps": 10, "steps": len(losses), **options}
    settings, steps = FinetuneOptions.model_validate(fields), steps_of(losses)
    ends = set()
    for resumed in (0, 7, 33):
        dog = Watchdog(settings, steps[:resumed])
        try:
            for step in steps[resumed:]:
                dog.see(step)
            ends.add(None)
        except QualityGateFailed:
            ends.add(step.number)
    assert len(ends) == 1
    return ends.pop()


def noisy(loss: float, count: int, spread: float = 0.05) -> list[float]:
    draw = random.Random(count)
    return [loss * (1 + draw.gauss(0, spread)) for _ in range(count)]


def falling(count: int) -> list[float]:
    return [4 - step * 1.5 / count for step in range(count)]


def test_a_loss_that_rises_and_stays_up_is_seen_soon() -> None:
    assert stopped_at(falling(60) + [2.5 + 0.1 * n for n in range(60)]) in range(65, 85)
    assert stopped_at(falling(60) + [9.0] * 30) in range(64, 71)
    assert stopped_at(noisy(3.0, 60) + noisy(3.6, 30)) in range(64, 80)


def test_noise_spikes_and_plateaus_are_no_rise() -> None:
    assert stopped_at(noisy(3.0, 400)) is None
    assert stopped_at(falling(100) + noisy(2.5, 200, 0.08)) is None
    assert stopped_at(falling(60) + [50.0] * 4 + [2.5] * 40) is None
    warmed_up = [3.0 + 0.2 * min(step, 60 - step) / 30 for step in range(60)]
    assert stopped_at(warmed_up) is None


def test_a_stage_with_another_objective_begins_anew() -> None:
    losses = [0.1] * 40 + [3.0] * 40
    stages = [StageOptions(objective="align", steps=40), StageOptions(objective="train", steps=40)]
    assert stopped_at(losses, steps=None, stages=stages) is None
    assert stopped_at(losses) in range(44, 51)


def test_it_can_be_switched_off() -> None:
    assert stopped_at(falling(60) + [9.0] * 30, stop_when_rising_steps=None) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_at_once(value: float) -> None:
    options = FinetuneOptions(learning_rate=3e-3)
    with pytest.raises(QualityGateFailed, match=r"step 1: the loss is .*learning_rate \(0\.003\)"):
        Watchdog(options).see(steps_of([value])[0])
    with pytest.raises(QualityGateFailed, match="step 1: the gradient norm is"):
        Watchdog(options).see(steps_of([1.0], gradient_norm=value)[0])


def test_the_message_says_from_where_to_where_and_what_to_do() -> None:
    dog = Watchdog(FinetuneOptions(stop_when_rising_steps=5))
    with pytest.raises(
        QualityGateFailed,
        match=r"step 14: the loss has risen to 5 from 2 at step 8 \(medians of 5 steps\).*"
        r"learning_rate \(0\.0003\).*stop_when_rising_steps: null",
    ):
        for step in steps_of([3.0] * 5 + [2.0] * 6 + [5.0] * 5):
            dog.see(step)
