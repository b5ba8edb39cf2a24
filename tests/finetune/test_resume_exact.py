"""A run that is cut anywhere and resumed is bit for bit the one that is not, and so its report."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hysparse_cli.finetune import finetune
from hysparse_cli.recipe import FinetuneOptions
from tests.finetune.conftest import Convert
from tests.finetune.test_resume import Stopped, options_for, stop_at, weights

STAGES = [
    {"objective": "align", "steps": 12},
    {"objective": "distill", "steps": 16, "hidden_weight": 0.5, "learning_rate": 1e-3},
    {"objective": "train", "steps": 12, "warmup_steps": 3},
]


@pytest.fixture
def rates() -> Iterator[list[float]]:
    """The learning rate that an optimiser has at each of its steps."""
    used: list[float] = []

    def see(optimizer: Any, *args: object) -> None:
        used.append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(see)
    yield used
    hook.remove()


def cut_at(cuts: tuple[int, ...], checkpoint: Path, out: Path, options: FinetuneOptions) -> Any:
    """The result of a run that is stopped after each of the steps ``cuts``."""
    for cut in cuts:
        changed = {"resume": "auto", "save_every_steps": cut}
        with pytest.raises(Stopped):
            finetune(str(checkpoint), out, options.model_copy(update=changed), stop_at(cut + 1))
    resumed = options.model_copy(update={"resume": "auto"})
    return finetune(str(checkpoint), out, resumed, lambda now: None)


@pytest.mark.parametrize(
    ("stages", "cuts"),
    [([], (2, 20, 38)), (STAGES, (2, 11, 12, 14, 20, 27, 30, 38))],
    ids=["one stage", "stages"],
)
def test_cut_in_warm_up_plateau_and_decay_a_run_is_the_same_bit_for_bit(
    converted: Convert,
    tiny_original: Path,
    documents_file: Path,
    tmp_path: Path,
    rates: list[float],
    stages: list[dict[str, Any]],
    cuts: tuple[int, ...],
) -> None:
    torch.set_num_threads(1)
    checkpoint = converted()
    fields: dict[str, Any] = {"stages": stages, "steps": 40, "gradient_accumulation": 1}
    options = options_for(
        documents_file, tiny_original, **fields, save_every_steps="off", sequence_tokens=16
    )
    whole = finetune(str(checkpoint), tmp_path / "whole", options, lambda now: None)
    assert [step.learning_rate for step in whole.steps] == rates
    assert len(set(rates)) >= 6
    rates.clear()
    result = cut_at(cuts, checkpoint, tmp_path / "out", options)
    assert result.resumed_at == cuts[-1]
    assert result.steps == whole.steps
    done = [cuts[0] + 1, *(b - a + 1 for a, b in pairwise(cuts))]
    begin = 0  # each part made one step more than was saved
    for cut, count in zip((0, *cuts), (*done, 40 - cuts[-1]), strict=True):
        made = rates[begin : begin + count]
        assert made == [step.learning_rate for step in whole.steps[cut : cut + count]]
        begin += count
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
