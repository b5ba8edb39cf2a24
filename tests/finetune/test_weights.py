from pathlib import Path

import pytest
import torch
from torch import nn

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.finetune.weights import MasterWeights, select_trainable
from hysparse_cli.loading import load
from tests.finetune.conftest import Convert


def test_groups_choose_parameters(converted: Convert) -> None:
    model = load(str(converted())).model
    everything = {name for name, _ in model.named_parameters()}
    assert set(select_trainable(model, "all")) == everything
    attention = set(select_trainable(model, "attention"))
    assert attention == {name for name in everything if ".self_attn." in name}
    new = set(select_trainable(model, "new"))
    assert new == {
        f"model.layers.{layer}.self_attn.hysparse.{name}"
        for layer in (1, 2)
        for name in ("gate.weight", "gate.bias", "sinks")
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == new


def test_a_dense_model_has_attention_but_nothing_new(tiny_original: Path) -> None:
    model = load(str(tiny_original)).model
    assert len(select_trainable(model, "attention")) == 4 * 6
    with pytest.raises(InvalidRecipe, match=r"finetune\.trainable is 'new'"):
        select_trainable(model, "new")


def test_matrices_decay_vectors_and_sinks_do_not(converted: Convert) -> None:
    model = load(str(converted())).model
    parameters = select_trainable(model, "all")
    weights = MasterWeights(parameters)
    decayed, plain = weights.groups(0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(master): name for name, master in weights.masters.items()}
    never = {names[id(p)] for p in plain["params"]}
    assert never == {
        name for name, p in parameters.items() if p.dim() == 1 or name.endswith(".sinks")
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(parameters)


def test_steps_below_the_precision_of_bfloat16_add_up() -> None:
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    weights = MasterWeights({"w": parameter})
    optimizer = torch.optim.SGD(weights.masters.values(), lr=1e-4)
    for _ in range(100):
        for _ in range(2):  # gradients of two batches add up
            parameter.grad = torch.full_like(parameter, 0.5)
            weights.take_gradients()
        assert parameter.grad is None
        optimizer.step()
        optimizer.zero_grad()
        weights.publish()
    torch.testing.assert_close(weights.masters["w"].detach(), torch.full((4, 4), 0.99))
    assert torch.equal(parameter, torch.full((4, 4), 0.99).bfloat16())


def test_a_float32_parameter_is_its_own_master() -> None:
    parameter = nn.Parameter(torch.ones(3))
    assert MasterWeights({"w": parameter}).masters["w"] is parameter
