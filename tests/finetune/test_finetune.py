import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from hysparse_cli.files.checkpoint import open_checkpoint
from hysparse_cli.finetune import finetune
from hysparse_cli.model.config import spec_of
from hysparse_cli.model.loading import load
from hysparse_cli.recipe import FinetuneOptions, load_section
from tests.conftest import Hysparse
from tests.finetune.conftest import Convert

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("--steps=3", "--batch-size=2", "--sequence-tokens=16")


@pytest.fixture(params=["dense", "full", "hysparse", "hybrid-swa"])
def checkpoint(request: pytest.FixtureRequest, tiny_original: Path, converted: Convert) -> Path:
    if request.param == "dense":
        return tiny_original
    return converted(layout=request.param, ratio=None if request.param == "full" else "1:2")


def test_any_checkpoint_learns_and_stays_what_it_is(
    hysparse: Hysparse, checkpoint: Path, documents_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--steps=40", "--batch-size=8", "--sequence-tokens=32", "--learning-rate=1e-2")
    run = hysparse("finetune", checkpoint, out, "--data", documents_file, *flags, "--json")
    assert run.exit_code == 0, run.stderr
    result = json.loads(run.stdout)
    losses = [step["next_token_loss"] for step in result["steps"]]
    assert len(losses) == 40
    assert losses[-1] < 0.75 * losses[0]
    before, after = open_checkpoint(checkpoint), open_checkpoint(out)
    assert {n: (t.shape, t.dtype) for n, t in after.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in before.tensors.items()
    }
    reloaded = load(str(out))
    assert spec_of(reloaded.model.config) == spec_of(AutoConfig.from_pretrained(checkpoint))
    assert reloaded.model.config.model_type == "qwen3"
    assert after.config.get("hysparse") == before.config.get("hysparse")
    assert after.config["model_type"] == before.config["model_type"]
    assert after.config.get("auto_map") == before.config.get("auto_map")
    assert reloaded.tokenizer.chat_template
    written = {path.name for path in out.iterdir()}
    kept = {path.name for path in checkpoint.iterdir() if path.suffix != ".safetensors"}
    assert written >= kept - {"model.safetensors.index.json"} | {"hysparse_finetune.json"}
    sections = yaml.safe_load((out / "hysparse_recipe.yaml").read_text())
    assert ("convert" in sections) == (before.config["model_type"] == "hysparse")
    assert load_section(FinetuneOptions, out / "hysparse_recipe.yaml").learning_rate == 1e-2
    assert json.loads((out / "hysparse_finetune.json").read_text()) == result
    if (checkpoint / "README.md").exists():
        card = (out / "README.md").read_text()
        assert "not been trained" not in card
        spec = spec_of(before.config)
        sparse = spec is not None and bool(spec.layers.sparse_layers)
        assert ("It was trained on" in card) == sparse


def test_distillation_brings_the_model_closer_to_its_teacher(
    hysparse: Hysparse,
    converted: Convert,
    tiny_original: Path,
    documents_file: Path,
    tmp_path: Path,
) -> None:
    flags = ("--batch-size=8", "--sequence-tokens=64", "--learning-rate=1e-2", "--data")
    teacher = tmp_path / "teacher"
    hysparse("finetune", tiny_original, teacher, "--steps=20", *flags, documents_file)
    student = (converted(), tmp_path / "out", "--teacher", teacher, "--steps=30")
    run = hysparse("finetune", *student, *flags, documents_file, "--json")
    distances = [step["distill_loss"] for step in json.loads(run.stdout)["steps"]]
    assert distances[-1] < 0.5 * distances[0]


def test_only_the_group_changes(
    hysparse: Hysparse, converted: Convert, documents_file: Path, tmp_path: Path
) -> None:
    checkpoint, out = converted(), tmp_path / "out"
    hysparse("finetune", checkpoint, out, "--data", documents_file, *SMALL, "--trainable=new")
    before, after = load(str(checkpoint)).model.state_dict(), load(str(out)).model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".hysparse." in name for name in changed)


def test_batches_and_accumulation_add_up_to_the_same(
    tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    def losses(name: str, **options: Any) -> list[float]:
        fields = {"data": str(documents_file), "steps": 5, "sequence_tokens": 32, **options}
        run = finetune(
            str(tiny_original), tmp_path / name, FinetuneOptions(**fields), lambda now: None
        )
        return [step.loss for step in run.steps]

    whole = losses("whole", batch_size=4)
    assert losses("parts", batch_size=1, gradient_accumulation=4) == pytest.approx(whole, rel=1e-5)
    assert losses("again", batch_size=4, gradient_checkpointing=True) == pytest.approx(whole)


def test_the_learning_rate_warms_up_stays_and_decays(
    tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    options = FinetuneOptions(
        data=str(documents_file),
        steps=20,
        batch_size=1,
        sequence_tokens=16,
        learning_rate=1.0e-3,
        warmup_steps=4,
        decay_fraction=0.25,
    )
    run = finetune(str(tiny_original), tmp_path / "out", options, lambda now: None)
    rates = [step.learning_rate for step in run.steps]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[4:16] == pytest.approx([1e-3] * 12)
    assert all(later < earlier for earlier, later in pairwise(rates[15:]))
    assert 0 < rates[-1] < 2e-4


def test_every_flag_reaches_the_recipe_and_the_table_shows_the_curve(
    hysparse: Hysparse, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("finetune:\n  seed: 7\n  steps: 99\n")
    flags = {
        "data": str(documents_file),
        "teacher": str(tiny_original),
        "steps": 3,
        "batch_size": 2,
        "sequence_tokens": 16,
        "learning_rate": 2e-3,
        "trainable": "attention",
        "save_every_steps": 2,
        "dtype": "bfloat16",
        "device": "cpu",
    }
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    more = ("--recipe", recipe, "--set", "finetune.weight_decay=0.05", "--overwrite")
    run = hysparse("finetune", tiny_original, out, *given, *more)
    assert run.exit_code == 0, run.stderr
    assert "KL to teacher" in run.stdout
    assert "step 3/3: loss" in run.stderr
    resolved = yaml.safe_load((out / "hysparse_recipe.yaml").read_text())["finetune"]
    extra = {"seed": 7, "weight_decay": 0.05}
    assert {name: resolved[name] for name in flags | extra} == flags | extra
    assert "overwrite" not in resolved
    assert load(str(out)).model.dtype == torch.bfloat16


def one_line(run: Any, exit_code: int, *words: object) -> None:
    assert run.exit_code == exit_code, run.stderr
    assert run.stdout == ""
    beside = ("step ", "hysparse: state is saved every")
    lines = [line for line in run.stderr.splitlines() if not line.startswith(beside)]
    assert len(lines) == 1, run.stderr
    for word in words:
        assert str(word) in lines[0]


def test_what_the_user_got_wrong_is_one_line(
    hysparse: Hysparse, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = tmp_path / "a.jsonl"

    def run(*args: object, data: Path = documents_file) -> Any:
        return hysparse("finetune", tiny_original, out, "--data", data, *SMALL, *args)

    one_line(hysparse("finetune", tiny_original, out), 3, "finetune.data is not given")
    one_line(run(data=tmp_path / "no.jsonl"), 7, "no.jsonl: No such file")
    text.write_text("")
    one_line(run(data=text), 7, text, "holds no text")
    text.write_text('{"text": "w1 w2"}\n{"body": "w1"}\n')
    one_line(run(data=text), 7, "line 2 has no field 'text'", "'body'", "text_field")
    one_line(
        run("--sequence-tokens=513"), 3, "finetune.sequence_tokens is 513", "512", tiny_original
    )
    one_line(run("--trainable=new"), 3, "finetune.trainable is 'new'")
    one_line(run("--resume", tmp_path / "none"), 3, "nothing to resume", tmp_path / "none", "auto")
    one_line(
        run("--set=finetune.warmup_steps=3"), 3, "warmup_steps 3", "decay_fraction 0.2", "steps 3"
    )
    one_line(run("--set=finetune.adam_beta2=1.0"), 3, "finetune.adam_beta2")
    one_line(run("--teacher", tmp_path / "none"), 7, tmp_path / "none")
    assert not out.exists()
    out.mkdir()
    (out / "keep").write_text("")
    one_line(run(), 3, "is not empty")
    assert [path.name for path in out.iterdir()] == ["keep"]
    assert not list(tmp_path.glob("out.*"))


def test_a_teacher_with_another_vocabulary_is_refused(
    hysparse: Hysparse,
    tiny_original: Path,
    tiny_checkpoint: Path,
    documents_file: Path,
    tmp_path: Path,
) -> None:
    args = (tiny_original, tmp_path / "out", "--data", documents_file, *SMALL, "--teacher")
    tokenizer = tiny_checkpoint / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w5"', '"other"'))
    run = hysparse("finetune", *args, tiny_checkpoint)
    one_line(run, 3, f"finetune.teacher {tiny_checkpoint} has another vocabulary", "but others")


def test_a_teacher_that_takes_less_is_refused(
    hysparse: Hysparse,
    tiny_original: Path,
    tiny_checkpoint: Path,
    documents_file: Path,
    tmp_path: Path,
) -> None:
    config = tiny_checkpoint / "config.json"
    shorter = {**json.loads(config.read_text()), "max_position_embeddings": 128}
    config.write_text(json.dumps(shorter))
    args = (tiny_original, tmp_path / "out", "--data", documents_file, "--sequence-tokens=256")
    run = hysparse("finetune", *args, "--teacher", tiny_checkpoint)
    one_line(run, 3, "finetune.sequence_tokens is 256", f"{tiny_checkpoint} takes 128 at most")


def test_data_of_single_tokens_is_refused(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = tiny_checkpoint / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": None}))
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "w1"}\n')
    run = hysparse("finetune", tiny_checkpoint, tmp_path / "out", "--data", text, *SMALL)
    one_line(run, 7, text, "give longer documents")


def test_a_loss_that_is_not_finite_stops_the_run(
    hysparse: Hysparse, tiny_checkpoint: Path, documents_file: Path, tmp_path: Path
) -> None:
    shard = next(
        path
        for path in sorted(tiny_checkpoint.glob("*.safetensors"))
        if "model.norm.weight" in load_file(path)
    )
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    out = tmp_path / "out"
    run = hysparse("finetune", tiny_checkpoint, out, "--data", documents_file, *SMALL)
    one_line(run, 6, "step 1: the loss is nan", "finetune.learning_rate (0.0003)")
    assert not out.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_running_out_of_memory_names_the_fields_that_help(
    tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    limited = """
import resource, torch
from hysparse_cli.finetune import trainer
count = trainer.count_targets
def limit(batch):
    now = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    room = 1024 * int(now.split()[1]) + (64 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    return count(batch)
trainer.count_targets = limit
from hysparse_cli.cli import main
main()
"""
    args = (tiny_original, tmp_path / "out", "--data", documents_file)
    huge = ("--batch-size=64", "--sequence-tokens=512", "--set=finetune.shuffle_rows=1")
    paths = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"
    run = subprocess.run(
        [sys.executable, "-c", limited, "finetune", *map(str, args), "--steps=1", *huge],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 5, run.stderr
    assert "hysparse: out of memory; " in run.stderr
    for field in ("batch_size below 64", "gradient_checkpointing", "sequence_tokens", "dtype"):
        assert field in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_real_checkpoint_learns_from_real_text(
    hysparse: Hysparse, stories_260k: Path, gutenberg_dev: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--steps=15", "--batch-size=4", "--sequence-tokens=128", "--learning-rate=2e-3")
    run = hysparse("finetune", stories_260k, out, "--data", gutenberg_dev, *flags, "--json")
    losses = [step["next_token_loss"] for step in json.loads(run.stdout)["steps"]]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5


@pytest.mark.parametrize(
    "recipe", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda p: p.name
)
def test_ready_recipes_are_valid(recipe: Path) -> None:
    assert load_section(FinetuneOptions, recipe).total_steps > 0
