"""Aligning sparse layers with the dense teacher's, against computing each layer by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hysparse_cli.families import family_of
from hysparse_cli.finetune.align import align_sums
from hysparse_cli.finetune.losses import count_targets
from hysparse_cli.finetune.run import _checkpoint_activations
from hysparse_cli.finetune.weights import select_trainable
from tests.model.equivalences import SPEC, ids
from tests.model.tiny import TINY, dense_model, hysparse_model

Batch = dict[str, Tensor]


def batch_of(x: Tensor, lengths: tuple[int, ...]) -> Batch:
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(len(x), -1)
    return {"input_ids": x, "position_ids": positions, "labels": x.clone()}


def pair(family: str) -> tuple[Any, Any]:
    """A dense teacher and a student of its weights, with gates and sinks of its own."""
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    teacher, model = dense_model(family, **options), hysparse_model(family, SPEC)
    model.load_state_dict(teacher.state_dict(), strict=False)
    return teacher.requires_grad_(False), model


def one_by_one(model: Any, teacher: Any, batch: Batch) -> Tensor:
    """The same loss, each sparse layer in a forward of its own: the teacher's hidden states are
    what the layers before it give, and what it gives is taken from a hook."""
    family = family_of(model.config.model_type)
    inputs = {n: batch[n] for n in ("input_ids", "position_ids")}
    target: dict[int, Tensor] = {}
    hidden: dict[int, Tensor] = {}
    found: dict[int, Tensor] = {}

    def keep(store: dict[int, Tensor], layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            store[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def replace(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            return (hidden[layer], *args[1:]), kwargs

        return hook

    handles = []
    for layer in range(model.config.num_hidden_layers):
        at = {"layer": layer}
        teacher_attention = teacher.get_submodule(family.attention.format(**at))
        handles += [
            teacher_attention.register_forward_hook(keep(target, layer)),
            teacher.get_submodule(family.layer.format(**at)).register_forward_pre_hook(
                lambda module, args, layer=layer: hidden.__setitem__(layer, args[0])
            ),
            model.get_submodule(family.attention.format(**at)).register_forward_hook(
                keep(found, layer)
            ),
            model.get_submodule(family.layer.format(**at)).register_forward_pre_hook(
                replace(layer), with_kwargs=True
            ),
        ]
    teacher(**inputs, use_cache=False)
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    sparse = SPEC.layers.sparse_layers
    errors = [((found[i] - target[i]) ** 2).sum() / (target[i] ** 2).sum() for i in sparse]
    return count_targets(batch) * sum(errors, torch.zeros(())) / len(sparse)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", sorted(TINY))
def test_loss_and_gradients_are_those_of_each_layer_alone(family: str, checkpointing: bool) -> None:
    teacher, model = pair(family)
    batch = batch_of(ids(), (11, 23, 6))
    parameters = select_trainable(model, "sparse-attention")
    expected = one_by_one(model, teacher, batch)
    reference = torch.autograd.grad(expected, list(parameters.values()))
    if checkpointing:
        _checkpoint_activations(model.train())
    sums = align_sums(model, batch, teacher)
    sums.total.backward()
    torch.testing.assert_close(sums.align.double(), expected, rtol=1e-5, atol=0)
    for parameter, gradient in zip(parameters.values(), reference, strict=True):
        assert parameter.grad is not None
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * scale)
