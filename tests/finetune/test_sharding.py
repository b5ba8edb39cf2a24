"""FSDP2 changes neither losses nor gradients, and keeps steps that bfloat16 would lose."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from hysparse_cli.finetune.context_parallel import LocalBatch
from hysparse_cli.finetune.data import PackedRows, Row, own_batches
from hysparse_cli.finetune.distributed import World, joined
from hysparse_cli.finetune.objectives import OBJECTIVES
from hysparse_cli.finetune.run import _checkpoint_activations
from hysparse_cli.finetune.sharding import sharded, train_only, whole
from hysparse_cli.finetune.trainable import select_trainable
from hysparse_cli.model.loading import load
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.recipe.finetune import Stage
from tests.finetune.conftest import Convert

STAGES: dict[str, dict[str, Any]] = {
    "align": {},
    "distill": {"distill_weight": 0.7, "hidden_weight": 0.3},
    "train": {},
}


@pytest.fixture
def world() -> Iterator[World]:
    with joined("cpu") as world:
        yield world


def stage_of(objective: str, **options: Any) -> Stage:
    stage = {"objective": objective, "steps": 3, "teacher": "none", **options}
    teacher = stage.pop("teacher")
    return FinetuneOptions(stages=[stage], teacher=teacher).resolved_stages()[0]


def batch_of(documents_file: Path, tokenizer: Any) -> Row:
    options = FinetuneOptions(data=str(documents_file), sequence_tokens=48, shuffle_rows=1)
    rows = iter(PackedRows(options, tokenizer))
    return next(own_batches([next(rows) for _ in range(3)], 0, 1, 3))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_losses_and_gradients_are_those_of_the_plain_model(
    converted: Convert, tiny_original: Path, documents_file: Path, world: World, checkpointing: bool
) -> None:
    folder = str(converted(pattern="FSSFSF"[:4], ratio=None))
    batch = batch_of(documents_file, load(folder).tokenizer)
    plain, model = load(folder).model.train(), load(folder).model.train()
    teacher = load(str(tiny_original)).model.requires_grad_(False)
    if checkpointing:
        _checkpoint_activations(model)
    module = sharded(model, teacher, [name for name, _ in model.named_parameters()], world)
    for objective, options in STAGES.items():  # what is trained changes from stage to stage
        stage = stage_of(objective, **options)
        plain.zero_grad()
        model.zero_grad()
        expected_names = set(select_trainable(plain, stage.trainable))
        assert set(train_only(module, stage.trainable)) == expected_names
        sums = OBJECTIVES[objective](plain, LocalBatch(batch), teacher, stage)
        sums.total.backward()
        for _ in range(2):
            total, found = module(batch, stage)
            (total / 2).backward()
        expected = {"loss": sums.total} | sums.measured
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        ours, theirs = gradients(model), gradients(plain)
        assert set(ours) == set(theirs) <= expected_names
        assert objective == "align" or set(ours) == expected_names
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_steps_below_the_precision_of_bfloat16_add_up(
    converted: Convert, documents_file: Path, world: World
) -> None:
    loaded = load(str(converted()), dtype="bfloat16")
    model, name = loaded.model.train(), "model.layers.0.self_attn.q_norm.weight"  # of ones
    trained = {n for n, _ in model.named_parameters() if ".self_attn." in n}
    module = sharded(model, None, trained, world)
    weight = dict(model.named_parameters())[name]
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == trained
    train_only(module, "attention")
    seen: list[torch.dtype] = []
    norm = model.get_submodule(name.rpartition(".")[0])
    norm.register_forward_hook(lambda module, args, output: seen.append(module.weight.dtype))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    batch = batch_of(documents_file, loaded.tokenizer)
    for _ in range(3):
        total, _ = module(batch, stage_of("train", teacher=None))
        total.backward()
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        weight.grad.copy_(torch.ones_like(weight.grad))
        optimizer.step()
        optimizer.zero_grad()
    assert set(seen) == {torch.bfloat16}
    ((_, value),) = whole([(name, weight)])
    torch.testing.assert_close(value, torch.full_like(value, 1 - 3e-4))
