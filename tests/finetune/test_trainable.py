from pathlib import Path

import pytest

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.finetune.trainable import decay_groups, select_trainable
from hysparse_cli.model.loading import load
from tests.finetune.conftest import Convert


def test_groups_choose_parameters(converted: Convert) -> None:
    model = load(str(converted())).model
    everything = {name for name, _ in model.named_parameters()}
    assert set(select_trainable(model, "all")) == everything
    attention = set(select_trainable(model, "attention"))
    assert attention == {name for name in everything if ".self_attn." in name}
    sparse = set(select_trainable(model, "sparse-attention"))
    assert sparse == {name for name in attention if name.split(".")[2] in ("1", "2")}
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
    with pytest.raises(InvalidRecipe, match="trainable is 'new'"):
        select_trainable(model, "new")


def test_matrices_decay_vectors_and_sinks_do_not(converted: Convert) -> None:
    model = load(str(converted())).model
    parameters = select_trainable(model, "all")
    decayed, plain = decay_groups(parameters, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in parameters.items()}
    never = {names[id(p)] for p in plain["params"]}
    assert never == {
        name for name, p in parameters.items() if p.dim() == 1 or name.endswith(".sinks")
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(parameters)
