"""A run is what its checkpoint, teacher and data hold, wherever they lie, and most options."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hysparse_cli.finetune import finetune, fingerprint
from hysparse_cli.finetune.fingerprint import of_checkpoint, of_data
from hysparse_cli.finetune.identity import (
    BY_CONTENT,
    BY_STAGE,
    SAME_NUMBERS,
    SAME_WITHIN_ROUNDING,
    Run,
    differences,
    run_of,
)
from hysparse_cli.recipe import FinetuneOptions
from tests.conftest import Hysparse
from tests.finetune.test_resume import Stopped, arguments, options_for, stop_at, weights


def change_config(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"attention_dropout": 0.1}))


def change_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w1"', '"x1"'))


def change_weight(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[5] += 1e-3
    save_file(tensors, shard, metadata={"format": "pt"})


def change_dtype(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})


CHANGES = {
    "config": change_config,
    "tokenizer": change_tokenizer,
    "weights": change_weight,
    "tensors": change_dtype,
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_of_a_checkpoint_is_seen_by_its_name(tiny_checkpoint: Path, what: str) -> None:
    before = of_checkpoint(tiny_checkpoint)
    CHANGES[what](tiny_checkpoint)
    after = of_checkpoint(tiny_checkpoint)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == ({"weights", "tensors"} if what == "tensors" else {what})


def test_a_checkpoint_is_the_same_elsewhere_and_with_another_licence(
    tiny_original: Path, tiny_checkpoint: Path
) -> None:
    (tiny_checkpoint / "LICENSE").write_text("free")
    (tiny_checkpoint / "generation_config.json").write_text("{}")
    (tiny_checkpoint / "README.md").write_text("# tiny")
    assert of_checkpoint(tiny_checkpoint) == of_checkpoint(tiny_original)


def test_of_a_large_file_samples_and_the_size_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BELOW", 10**6)
    data = tmp_path / "large.txt"
    with data.open("wb") as file:
        file.truncate(10**9)  # takes no disk
    options = FinetuneOptions(data=str(data))
    found = [of_data(options)]
    for place in (0, 10**9 - 1, 10**9):  # the first byte, the last, and one more
        with data.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        found.append(of_data(options))
    assert len({one["content"] for one in found}) == 4


def test_data_is_its_content_and_its_ending(tmp_path: Path) -> None:
    def of(name: str, text: str = "w1 w2") -> Any:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return of_data(FinetuneOptions(data=str(path)))

    first = of("a.txt")
    assert of("other/b.TXT") == first
    assert of("b.v2.txt") == first
    assert of("a.jsonl") != first
    assert of("a.txt.xz") != first
    assert of("c.txt", "w1 w3") != first
    folder = tmp_path / "other"
    given = FinetuneOptions(data=f"hub:{folder}")
    before = of_data(given)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert of_data(FinetuneOptions(data=f"hub:{moved}")) == before
    of("other/b.TXT", "w1 w4")
    assert of_data(given) != before


CHANGED: dict[str, Any] = {
    "data_subset": "en",
    "data_split": "test",
    "text_field": "content",
    "sequence_tokens": 64,
    "shuffle_rows": 2,
    "seed": 1,
    "weight_decay": 0.2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 2.0,
    "lora_rank": 4,
    "lora_alpha": 3,
    "dtype": "bfloat16",
}


def test_every_option_is_free_or_judged_by_content_or_stage_or_makes_another_run(
    tiny_original: Path, documents_file: Path
) -> None:
    known = SAME_NUMBERS | SAME_WITHIN_ROUNDING | BY_CONTENT | BY_STAGE
    assert not known & CHANGED.keys()
    assert known <= FinetuneOptions.model_fields.keys()
    options = options_for(documents_file, None)
    before = run_of(tiny_original, options)
    for name in FinetuneOptions.model_fields.keys() - known:
        assert name in before.options
    for name, value in CHANGED.items():
        now = run_of(tiny_original, options.model_copy(update={name: value}))
        (line,) = differences(before, now)
        assert line.startswith(f"{name} (was ") and repr(value) in line
    half = options.model_copy(update={"batch_size": 1, "gradient_accumulation": 2})
    assert differences(before, run_of(tiny_original, half)) == [
        "batch_size x gradient_accumulation (was 4, is 2)"
    ]
    free = {"gradient_checkpointing": True, "keep_state": True, "stop_when_rising_steps": 3}
    assert run_of(tiny_original, options.model_copy(update=free)) == before
    assert isinstance(before, Run)


def test_another_teacher_checkpoint_or_data_at_the_same_place_is_another_run(
    hysparse: Hysparse,
    tiny_original: Path,
    tiny_checkpoint: Path,
    documents_file: Path,
    tmp_path: Path,
) -> None:
    teacher, out = Path(shutil.copytree(tiny_original, tmp_path / "teacher")), tmp_path / "out"
    options = options_for(documents_file, teacher, steps=6)
    with pytest.raises(Stopped):
        finetune(str(tiny_checkpoint), out, options, stop_at(3))
    given = (*arguments(options), "--resume", "auto")
    kept = Path(shutil.copytree(teacher, tmp_path / "kept"))
    for folder, what in ((teacher, "the teacher's"), (tiny_checkpoint, "the checkpoint's")):
        change_weight(folder)
        refused = hysparse("finetune", tiny_checkpoint, out, *given)
        assert refused.exit_code == 3 and refused.stderr.endswith(f"another run: {what} weights\n")
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    text = documents_file.read_text()
    documents_file.write_text(text.replace("w1", "w2", 1))
    refused = hysparse("finetune", tiny_checkpoint, out, *given)
    assert refused.exit_code == 3 and refused.stderr.endswith("another run: the data's content\n")

    moved = tmp_path / "moved.jsonl"
    moved.write_text(text)
    here = tiny_checkpoint.rename(tmp_path / "here")
    done = hysparse("finetune", here, out, *given, "--data", moved, "--teacher", kept, "--json")
    assert done.exit_code == 0, done.stderr
    notes = json.loads(done.stdout)["notes"]
    assert [note.partition(" was ")[0] for note in notes] == [
        "the checkpoint",
        "the teacher",
        "the data",
    ]
    assert all("with the same content: the same run" in note for note in notes)
    assert [f"hysparse: {note}" for note in notes] == done.stderr.splitlines()[:3]
    whole = finetune(
        str(tiny_original), tmp_path / "whole", options_for(moved, kept, steps=6), lambda now: None
    )
    assert json.loads(done.stdout)["steps"][-1]["loss"] == whole.steps[-1].loss
    assert weights(out) == weights(tmp_path / "whole")


def test_what_helps_against_too_little_memory_is_the_same_run(
    hysparse: Hysparse, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    options = options_for(documents_file, None, steps=6)
    whole = finetune(str(tiny_original), tmp_path / "whole", options, lambda now: None)
    out, checkpointed = tmp_path / "out", tmp_path / "checkpointed"
    for folder in (out, checkpointed):
        with pytest.raises(Stopped):
            finetune(str(tiny_original), folder, options, stop_at(3))
    recomputed = {"gradient_checkpointing": True, "resume": "auto"}
    same = finetune(
        str(tiny_original), checkpointed, options.model_copy(update=recomputed), lambda now: None
    )
    assert (same.steps, same.notes) == (whole.steps, [])
    assert weights(checkpointed) == weights(tmp_path / "whole")

    smaller = ("--set", "finetune.batch_size=1", "--set", "finetune.gradient_accumulation=4")
    args = (*arguments(options), *smaller, "--resume", "auto")
    run = hysparse("finetune", tiny_original, out, *args, "--json")
    assert run.exit_code == 0, run.stderr
    result = json.loads(run.stdout)
    (note,) = result["notes"]
    assert note == (
        "the same run within rounding from step 3 on, not bit for bit: batch_size (was 2, is 1), "
        "gradient_accumulation (was 2, is 4)"
    )
    assert f"hysparse: {note}" in run.stderr.splitlines()
    assert json.loads((out / "hysparse_finetune.json").read_text())["notes"] == [note]
    losses = [step["loss"] for step in result["steps"]]
    assert losses == pytest.approx([step.loss for step in whole.steps], rel=1e-5)
    refused = ("--set", "finetune.batch_size=1", "--resume", "auto")
    with pytest.raises(Stopped):
        finetune(str(tiny_original), tmp_path / "other", options, stop_at(3))
    run = hysparse("finetune", tiny_original, tmp_path / "other", *arguments(options), *refused)
    assert run.exit_code == 3
    assert "batch_size x gradient_accumulation (was 4, is 2)" in run.stderr
