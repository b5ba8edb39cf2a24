"""What convert writes can be loaded: what could not is refused, or left out where it may be."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hysparse_cli.convert.dense import read_dense
from hysparse_cli.convert.plan import plan
from hysparse_cli.convert.write import execute
from hysparse_cli.errors import HysparseError, UnreadableInput
from hysparse_cli.files.source import Source
from hysparse_cli.recipe import ConvertOptions
from tests.conftest import Hysparse
from tests.long.case import Damage, set_json
from tests.long.sweep import run_sweep


def _written(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def test_a_sample_of_the_sweep_of_malformed_checkpoints(tiny_original: Path) -> None:
    run = run_sweep(tiny_original, every=97)
    assert run.returncode == 0 and run.cases >= 25, run.stdout


def test_how_to_run_a_model_and_labels_of_classes_are_left_out(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    switches = {
        "num_labels": 10_000_000,
        "id2label": {"0": "x"},
        "return_dict": False,
        "output_attentions": True,
        "_attn_implementation": "flash_attention_2",
        "transformers_weights": "elsewhere.safetensors",
        "quantization_config": None,
    }
    set_json("config.json", **switches)(tiny_checkpoint)
    run = hysparse("convert", tiny_checkpoint, tmp_path / "out")
    assert run.exit_code == 0, run.stderr
    assert not switches.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(3)[None]).logits).all()


def test_a_tokenizer_with_more_tokens_than_the_model_embeds(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tiny_checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"new{i}": 64 + i for i in range(6)}
    path.write_text(json.dumps(tokenizer))
    out = tmp_path / "out"
    run = hysparse("convert", tiny_checkpoint, out)
    assert run.exit_code == 0
    assert "the tokenizer has 70 tokens and the model embeds 64" in run.stderr
    beyond = hysparse("generate", out, "--prompt", "w1 new3", "--max-new-tokens", 2)
    assert beyond.exit_code == 7 and beyond.stderr.count("\n") == 1, beyond.stderr
    assert "token 'new3' of id 67, but the model embeds 64" in beyond.stderr
    within = hysparse("generate", out, "--prompt", "w1 w2", "--max-new-tokens", 2)
    assert within.exit_code == 0, within.stderr
    set_json("tokenizer.json", added_tokens=[])(out)
    data = tmp_path / "text.txt"
    data.write_text("w1 w2 new5 w3 " * 40)
    evaluated = hysparse("eval", out, "--data", data, "--sequence-tokens", 32)
    assert evaluated.exit_code == 7 and "new5" in evaluated.stderr, evaluated.stderr


UNLOADABLE: dict[str, tuple[Damage, str]] = {
    "no generation config": (_written("generation_config.json", "[]"), "no JSON object"),
    "a tokenizer cut short": (
        lambda folder: os.truncate(folder / "tokenizer.json", 300),
        "no tokenizer that can be read",
    ),
    "no tokenizer config": (_written("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    "30 MB of added tokens": (_written("added_tokens.json", "[{}]," * 6_000_000), "bytes, more"),
}


@pytest.mark.parametrize("name", UNLOADABLE)
def test_small_files_that_could_not_be_loaded(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    damage, reason = UNLOADABLE[name]
    damage(tiny_checkpoint)
    run = hysparse("convert", tiny_checkpoint, tmp_path / "out")
    assert run.exit_code == 7 and reason in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("command", ["convert", "generate", "eval"])
def test_a_folder_of_an_adapter_alone_says_of_what(
    hysparse: Hysparse, tmp_path: Path, command: str
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": "some/\x1b[31mbase"}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    arguments = {
        "convert": (tmp_path / "out",),
        "generate": ("--prompt", "x"),
        "eval": ("--data", adapter / "adapter_config.json"),
    }
    run = hysparse(command, adapter, *arguments[command])
    assert run.exit_code == 7 and run.stderr.count("\n") == 1, run.stderr
    assert r"holds an adapter (adapter_config.json) of some/\x1b[31mbase: merge" in run.stderr


def test_an_adapter_is_refused_wherever_a_checkpoint_is_loaded(
    hysparse: Hysparse, tiny_checkpoint: Path
) -> None:
    (tiny_checkpoint / "adapter_config.json").write_text("{}")
    run = hysparse("generate", tiny_checkpoint, "--prompt", "w1")
    assert run.exit_code == 7 and "merge_and_unload" in run.stderr, run.stderr


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_shard_that_vanishes_between_its_header_and_its_copy(
    tiny_checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    options = ConvertOptions.model_validate({"dtype": dtype})
    planned = plan(read_dense(Source(str(tiny_checkpoint), tiny_checkpoint)), options)
    gone = planned.dense.checkpoint.shards[2].path
    gone.unlink()
    with pytest.raises(UnreadableInput, match=f"can't read .*{gone.name}"):
        execute(planned, tmp_path / "out", lambda done, total: None)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_names_are_no_markup_of_the_model_card(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "a`|<script>\n---\n[x](y)\x1b[31m\u202e"
    shutil.copytree(tiny_original, odd)
    run = hysparse("convert", odd, tmp_path / "out")
    assert run.exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.replace("\n", "").isprintable()
    assert "`a___script_" in card and "<script>" not in card and card.count("\n---\n") == 1
    assert "\x1b" not in run.stdout.replace("\x1b[0m", "").replace("\x1b[1m", "")


def test_a_header_may_be_large_only_within_reason(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shard = sorted(tiny_checkpoint.glob("*.safetensors"))[0]
    shard.write_bytes((99_000_000).to_bytes(8, "little") + b" " * 99_000_000)
    run = hysparse("convert", tiny_checkpoint, tmp_path / "out")
    assert run.exit_code == 7 and "a header of 99000000 bytes" in run.stderr


READ_BACK = {
    "no base": ({"base_model_type": None}, "no base_model_type"),
    "no section": ({"hysparse": None}, "no base_model_type or no section"),
    "a list": ({"hysparse": []}, "hysparse in config.json"),
    "a pattern too short": ({"hysparse": {"pattern": "FS"}}, "has 2 letters, but there are 4"),
    "a pattern of no layers": ({"hysparse": {"pattern": ""}}, "pattern is empty"),
    "a number as pattern": ({"hysparse": {"pattern": 3}}, "hysparse.pattern"),
    "no blocks": ({"hysparse": {"block_size": 0}}, "hysparse.block_size"),
    "no window": ({"hysparse": {"window_tokens": 1}}, "hysparse.window_tokens"),
    "another field": ({"hysparse": {"x\x1b": 1}}, r"hysparse.x\x1b"),
    "an unknown layout": ({"hysparse": {"layout": "x"}}, "hysparse.layout"),
    "a swap of one": ({"hysparse": {"swapped": [[1]]}}, "hysparse.swapped"),
}


@pytest.mark.parametrize("name", READ_BACK)
def test_a_converted_config_that_was_changed(tiny_converted: Path, name: str) -> None:
    changes, reason = READ_BACK[name]
    path = tiny_converted / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        section = isinstance(value, dict)
        config[key] = config[key] | value if section else value
    path.write_text(json.dumps(config))
    with pytest.raises(HysparseError) as refusal:
        AutoConfig.from_pretrained(tiny_converted)
    assert refusal.value.exit_code == 7 and reason in str(refusal.value).replace("\x1b", r"\x1b")
