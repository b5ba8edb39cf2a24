"""Stages one after the other, from the command line: what each measures and what it changes."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional

from hysparse_cli.files.checkpoint import open_checkpoint
from hysparse_cli.finetune.context_parallel import LocalBatch
from hysparse_cli.finetune.data import IGNORED, PackedRows, own_batches
from hysparse_cli.finetune.losses import count_targets, distill_sums, next_token_sums
from hysparse_cli.model.loading import load
from hysparse_cli.recipe import FinetuneOptions, load_section
from tests.conftest import Hysparse
from tests.finetune.conftest import Convert
from tests.finetune.test_align import batch_of, pair
from tests.model.equivalences import ids
from tests.model.tiny import TINY

STAGES = [
    {"objective": "align", "steps": 12, "learning_rate": 1e-3},
    {"objective": "distill", "steps": 8, "distill_weight": 0.5, "hidden_weight": 0.3},
    {"objective": "train", "steps": 4, "trainable": "new"},
]


def recipe(path: Path, **fields: Any) -> Path:
    small = {"batch_size": 4, "sequence_tokens": 32, "shuffle_rows": 1, "learning_rate": 3e-3}
    path.write_text(yaml.safe_dump({"finetune": small | fields}))
    return path


def changed(before: Path, after: Path) -> set[str]:
    old, new = (load(str(folder)).model.state_dict() for folder in (before, after))
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def losses_of(step: dict[str, Any]) -> set[str]:
    """The losses that a step of a report has, but for what is minimised."""
    return {name for name in step if name.endswith("_loss")}


def test_stages_run_one_after_the_other_and_each_measures_its_own(
    hysparse: Hysparse,
    converted: Convert,
    tiny_original: Path,
    documents_file: Path,
    tmp_path: Path,
) -> None:
    checkpoint, out = converted(), tmp_path / "out"
    args = (checkpoint, out, "--recipe", recipe(tmp_path / "r.yaml", stages=STAGES), "--json")
    run = hysparse("finetune", *args, "--data", documents_file, "--teacher", tiny_original)
    assert run.exit_code == 0, run.stderr
    steps = json.loads(run.stdout)["steps"]
    assert [step["objective"] for step in steps] == ["align"] * 12 + ["distill"] * 8 + ["train"] * 4
    assert [step["number"] for step in steps] == list(range(1, 25))
    align, distill, train = steps[:12], steps[12:20], steps[20:]
    assert align[-1]["align_loss"] < 0.9 * align[0]["align_loss"]
    for step in align:
        assert step["loss"] == step["align_loss"] > 0 and losses_of(step) == {"align_loss"}
    for step in distill:
        parts = 0.5 * step["next_token_loss"] + 0.5 * step["distill_loss"]
        assert step["loss"] == pytest.approx(parts + 0.3 * step["hidden_loss"], rel=1e-5)
        assert step["hidden_loss"] > 0
        assert losses_of(step) == {"next_token_loss", "distill_loss", "hidden_loss"}
    for step in train:
        assert step["loss"] == step["next_token_loss"] > 0
        assert losses_of(step) == {"next_token_loss"}
    peaks = [max(s["learning_rate"] for s in part) for part in (align, distill, train)]
    assert peaks == pytest.approx([1e-3, 3e-3, 3e-3])
    assert "model.layers.0.mlp.up_proj.weight" in changed(checkpoint, out)


def test_a_stage_cut_in_two_is_the_same_stage(
    hysparse: Hysparse, converted: Convert, documents_file: Path, tmp_path: Path
) -> None:
    whole = {"objective": "train", "steps": 6, "warmup_steps": 0, "decay_fraction": 0.0}
    checkpoint, weights = converted(), []
    for stages in ([whole], [whole | {"steps": 4}, whole | {"steps": 2}]):
        out = tmp_path / f"out-{len(stages)}"
        options = ("--recipe", recipe(tmp_path / "r.yaml", stages=stages), "--data", documents_file)
        assert hysparse("finetune", checkpoint, out, *options).exit_code == 0
        weights.append(load(str(out)).model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_aligning_changes_sparse_attention_alone(
    hysparse: Hysparse,
    converted: Convert,
    tiny_original: Path,
    documents_file: Path,
    tmp_path: Path,
) -> None:
    checkpoint, out = converted(), tmp_path / "out"
    path = recipe(tmp_path / "r.yaml", stages=STAGES)
    args = ("--recipe", path, "--set", "finetune.stages=[{objective: align, steps: 2}]")
    more = ("--data", documents_file, "--teacher", tiny_original)
    assert hysparse("finetune", checkpoint, out, *args, *more).exit_code == 0
    names = changed(checkpoint, out)
    assert names
    assert all(name.startswith(("model.layers.1.self", "model.layers.2.self")) for name in names)


@pytest.mark.parametrize("stages", [STAGES[:1], STAGES[1:2]], ids=["align", "distill"])
def test_several_full_layers_serve(
    hysparse: Hysparse,
    converted: Convert,
    tiny_original: Path,
    documents_file: Path,
    tmp_path: Path,
    stages: list[dict[str, Any]],
) -> None:
    path = recipe(tmp_path / "r.yaml", stages=stages, steps=2)
    args = (converted(ratio=None, pattern="FSFS"), tmp_path / "out", "--recipe", path, "--json")
    run = hysparse("finetune", *args, "--data", documents_file, "--teacher", tiny_original)
    assert run.exit_code == 0, run.stderr
    assert len(json.loads(run.stdout)["steps"]) == 2


def test_what_the_stages_need_is_said_at_once(
    hysparse: Hysparse, converted: Convert, tmp_path: Path
) -> None:
    path = recipe(tmp_path / "r.yaml", stages=STAGES)
    run = hysparse("finetune", converted(), tmp_path / "out", "--recipe", path)
    assert run.exit_code == 3 and run.stderr.count("\n") == 1
    assert "finetune.data is not given" in run.stderr
    assert "finetune.teacher is not given, which align and distill need" in run.stderr


def test_lora_ends_as_a_plain_checkpoint_that_is_what_was_trained(
    hysparse: Hysparse, converted: Convert, documents_file: Path, tmp_path: Path
) -> None:
    fields = {"lora_rank": 4, "trainable": "attention", "learning_rate": 2e-2}
    path = recipe(tmp_path / "r.yaml", **fields, warmup_steps=0, decay_fraction=0.0)
    checkpoint = converted()

    def run(steps: int) -> dict[str, Any]:
        args = (checkpoint, tmp_path / f"{steps}", "--recipe", path, "--data", documents_file)
        result: dict[str, Any] = json.loads(
            hysparse("finetune", *args, "--steps", steps, "--json").stdout
        )
        return result

    short, long = run(10), run(11)
    projections = 4 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32)  # of a layer, at rank 4
    assert short["num_trained"] == 4 * projections + 2 * (8 * 32 + 8 + 8)
    out = tmp_path / "10"
    assert {n: t.shape for n, t in open_checkpoint(out).tensors.items()} == {
        n: t.shape for n, t in open_checkpoint(checkpoint).tensors.items()
    }
    names = changed(checkpoint, out)
    assert len(names) == 4 * 4 + 2 * 3
    assert all("_proj.weight" in name or ".hysparse." in name for name in names)
    options = load_section(FinetuneOptions, path, flags={"data": str(documents_file)})
    rows = list(islice(PackedRows(options, load(str(out)).tokenizer), 40, 44))
    (batch,) = own_batches(rows, 0, 1, 4)  # what the eleventh step reads
    local = LocalBatch(batch)
    before, after = (
        next_token_sums(load(str(folder)).model, local).total.item() / count_targets(batch)
        for folder in (checkpoint, out)
    )
    assert after == pytest.approx(long["steps"][10]["loss"], rel=1e-5)
    assert abs(after - before) > 0.002


def test_lora_changes_nothing_before_it_is_trained(
    hysparse: Hysparse, converted: Convert, documents_file: Path, tmp_path: Path
) -> None:
    checkpoint, first = converted(), []
    for name, fields in (("lora", {"lora_rank": 2}), ("plain", {})):
        path = recipe(tmp_path / f"{name}.yaml", steps=1, **fields)
        args = (checkpoint, tmp_path / name, "--recipe", path, "--data", documents_file, "--json")
        first.append(json.loads(hysparse("finetune", *args).stdout)["steps"][0]["loss"])
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def hidden_by_hand(model: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    inputs = {n: batch[n] for n in ("input_ids", "position_ids")}
    ours, theirs = (
        m.get_submodule(m.base_model_prefix)(**inputs, output_hidden_states=True, use_cache=False)
        for m in (model, teacher)
    )
    num_targets = (batch["labels"][:, 1:] != IGNORED).sum(1)
    errors = [
        n * functional.mse_loss(a[row], b[row], reduction="sum") / (b[row] ** 2).sum()
        for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        for row, n in enumerate(num_targets)
    ]
    return torch.stack(errors).sum() * len(num_targets) / len(errors)


@pytest.mark.parametrize("family", sorted(TINY))
def test_hidden_states_of_every_layer_are_compared(family: str) -> None:
    teacher, model = pair(family)
    batch = batch_of(ids(), (11, 29))
    expected = hidden_by_hand(model, teacher, batch)
    sums = distill_sums(model, LocalBatch(batch), teacher, distill_weight=0.0, hidden_weight=2.0)
    torch.testing.assert_close(sums.measured["hidden_loss"].double(), expected, rtol=1e-5, atol=0)
    measured = sums.measured
    expected_total = measured["next_token_loss"] + 2 * measured["hidden_loss"]
    torch.testing.assert_close(sums.total, expected_total)
    layers = model.config.num_hidden_layers
    states = model(batch["input_ids"], output_hidden_states=True).hidden_states
    assert len(states) == layers + 1


def test_a_batch_without_targets_has_a_loss_and_gradients_of_zero() -> None:
    teacher, model = pair("llama")
    batch = batch_of(ids(), (40,))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    weights = {"distill_weight": 0.5, "hidden_weight": 0.5}
    local = LocalBatch(batch)
    for sums in (next_token_sums(model, local), distill_sums(model, local, teacher, **weights)):
        assert sums.total.item() == 0
        sums.total.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
