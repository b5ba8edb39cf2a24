"""Aligning sparse layers with the dense teacher's, against computing each layer by itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hysparse_cli.convert.dense import read_dense
from hysparse_cli.convert.plan import plan
from hysparse_cli.convert.write import execute
from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.families import family_of
from hysparse_cli.files.source import locate
from hysparse_cli.finetune.align import align_sums
from hysparse_cli.finetune.context_parallel import LocalBatch
from hysparse_cli.finetune.data import IGNORED
from hysparse_cli.finetune.losses import count_targets
from hysparse_cli.finetune.objectives import check_objectives
from hysparse_cli.finetune.run import _checkpoint_activations
from hysparse_cli.finetune.trainable import select_trainable
from hysparse_cli.model.config import HysparseSpec, spec_of
from hysparse_cli.model.loading import load
from hysparse_cli.model.state import forward_state
from hysparse_cli.recipe import ConvertOptions, FinetuneOptions
from hysparse_cli.recipe.finetune import StageOptions
from tests.model.equivalences import SPEC, TOKENS, ids
from tests.model.tiny import KINDS, dense_config, dense_model, hysparse_model

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

    def feed(layer: int) -> Any:
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
                feed(layer), with_kwargs=True
            ),
        ]
    teacher(**inputs, use_cache=False)
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    sparse = SPEC.layers.sparse_layers
    num_targets = (batch["labels"][:, 1:] != IGNORED).sum(1)
    errors = [
        num_targets[row]
        * ((found[i][row] - target[i][row]) ** 2).sum()
        / (target[i][row] ** 2).sum()
        for i in sparse
        for row in range(len(num_targets))
    ]
    return sum(errors, torch.zeros(())) / len(sparse)


CHECKPOINTED = ("llama", "gpt_neox", "gpt_oss")


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [*((name, False) for name in KINDS), *((name, True) for name in CHECKPOINTED)],
)
def test_loss_and_gradients_are_those_of_each_layer_alone(family: str, checkpointing: bool) -> None:
    teacher, model = pair(family)
    batch = batch_of(ids(), (11, 23, 6))
    parameters = select_trainable(model, "sparse-attention")
    expected = one_by_one(model, teacher, batch)
    reference = torch.autograd.grad(expected, list(parameters.values()))
    if checkpointing:
        _checkpoint_activations(model.train())
    sums = align_sums(model, LocalBatch(batch), teacher)
    sums.total.backward()
    torch.testing.assert_close(sums.measured["align_loss"].double(), expected, rtol=1e-5, atol=0)
    for parameter, gradient in zip(parameters.values(), reference, strict=True):
        assert parameter.grad is not None
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * scale)


def test_a_layer_called_by_itself_gives_the_same(converted_stories: tuple[Any, Any]) -> None:
    """Without hooks: the layers' modules one by one, fed what the teacher's API gives."""
    teacher, model = converted_stories
    batch = batch_of(torch.arange(3, 83)[None], (50, 30))
    positions, spec = batch["position_ids"], spec_of(model.config)
    assert spec is not None
    with torch.no_grad():
        hidden = layer_inputs(teacher, batch)
    rotary = model.model.rotary_emb(hidden[0], positions)
    parameters = select_trainable(model, "sparse-attention")
    state = forward_state(spec, batch["input_ids"], None, positions, None)
    errors = []
    for number, x in enumerate(hidden):
        layer, own = teacher.model.layers[number], model.model.layers[number]
        normed = layer.input_layernorm(x)
        out, _ = own.self_attn(normed, position_embeddings=rotary, hysparse=state)
        if number in spec.layers.sparse_layers:
            mask = document_mask(positions)
            target, _ = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)
            errors.append((out - target).square().sum() / target.square().sum())
    expected = 78 * sum(errors, torch.zeros(())) / len(errors)  # two tokens begin a document
    batch["labels"] = batch["labels"].masked_fill(positions == 0, IGNORED)
    ours = align_sums(model, LocalBatch(batch), teacher).total
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=0)
    both = [torch.autograd.grad(loss, list(parameters.values())) for loss in (ours, expected)]
    for mine, reference in zip(*both, strict=True):
        scale = reference.abs().max().item()
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4 * scale)
    assert any(gradient.any() for gradient in both[0])


def layer_inputs(teacher: Any, batch: Batch) -> list[Tensor]:
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    return list(teacher(**inputs, use_cache=False, output_hidden_states=True).hidden_states[:-1])


def document_mask(positions: Tensor) -> Tensor:
    """(1, 1, T, T): what a query sees, of its document and not after it."""
    document = (positions[0] == 0).cumsum(0)
    causal = torch.ones(len(document), len(document), dtype=torch.bool).tril()
    return (causal & (document[:, None] == document))[None, None]


@pytest.fixture
def converted_stories(stories_260k: Path, tmp_path: Path) -> tuple[Any, Any]:
    """A real dense model and its plain conversion, FSSSF, with random gates and sinks."""
    options = ConvertOptions(pattern="FSSSF", block_size=8, top_k_tokens=16, window_tokens=12)
    planned = plan(read_dense(locate(str(stories_260k))), options)
    execute(planned, tmp_path / "out", lambda done, total: None)
    model = load(str(tmp_path / "out"), device="cpu").model
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".hysparse." in name:
            torch.nn.init.normal_(parameter)
    return load(str(stories_260k), device="cpu").model.requires_grad_(False), model


def test_a_window_over_everything_with_its_gate_open_is_the_dense_layer() -> None:
    spec = HysparseSpec("FSSFS", block_size=4, top_k_tokens=8, window_tokens=TOKENS)
    teacher, model = dense_model("llama"), hysparse_model("llama", spec)
    model.load_state_dict(teacher.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("gate.weight"):
                parameter.zero_()
            if name.endswith("gate.bias"):  # block-sparse shut, window open
                parameter.copy_(torch.tensor([-1e3, 1e3]).repeat(parameter.numel() // 2))
            if name.endswith("sinks"):
                parameter.fill_(-1e9)
    batch = batch_of(ids(), (11, 23, 6))
    assert align_sums(model, LocalBatch(batch), teacher).total.item() < 1e-10
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1.5)  # an error of 0.5^2 in one of 3
    expected = count_targets(batch) * 0.25 / 3
    assert align_sums(model, LocalBatch(batch), teacher).total.item() == pytest.approx(
        expected, rel=1e-6
    )


def test_other_forwards_of_the_model_stay_what_they_were() -> None:
    teacher, model = pair("qwen3")
    batch = batch_of(ids(), (40,))
    before = model(batch["input_ids"]).logits
    align_sums(model, LocalBatch(batch), teacher).total.backward()
    torch.testing.assert_close(model(batch["input_ids"]).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "changes", "stage", "reason"),
    [
        ("dense", {}, {"objective": "align"}, "needs a checkpoint with sparse layers"),
        ("hysparse", {}, {"objective": "align"}, None),
        (
            "swapped",
            {},
            {"objective": "align"},
            "layers 3 and 1 hold attention that was swapped .* use objective distill",
        ),
        ("swapped", {}, {"objective": "distill"}, None),
        ("hysparse", {"teacher": "hysparse"}, {"objective": "align"}, "needs a dense teacher"),
        (
            "hysparse",
            {"num_hidden_layers": 3},
            {"objective": "align"},
            "the teacher has 3 of 32 where the checkpoint has 5 of 32",
        ),
        (
            "hysparse",
            {"hidden_size": 64},
            {"objective": "distill", "hidden_weight": 0.5},
            "hidden_weight compares layer with layer, but the teacher has 5 of 64",
        ),
        ("hysparse", {"hidden_size": 64}, {"objective": "distill"}, None),
    ],
)
def test_models_that_do_not_correspond_are_refused(
    family: str, changes: dict[str, Any], stage: dict[str, Any], reason: str | None
) -> None:
    swapped = ((3, 1),) if family == "swapped" else ()
    spec = replace(SPEC, swapped=swapped)
    model = dense_model("llama") if family == "dense" else hysparse_model("llama", spec)
    sparse_teacher = changes.pop("teacher", None)
    config = dense_config("llama", **changes)
    teacher = (
        hysparse_model("llama", SPEC)
        if sparse_teacher
        else AutoModelForCausalLM.from_config(config)
    )
    stages = FinetuneOptions(stages=[StageOptions(steps=5, **stage)]).resolved_stages()
    if reason is None:
        check_objectives(stages, model, teacher)
        return
    with pytest.raises(InvalidRecipe, match=reason):
        check_objectives(stages, model, teacher)
