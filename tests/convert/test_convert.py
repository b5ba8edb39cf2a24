"""Converting: what is written, that it loads, and that the weights are the dense model's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hysparse_cli.families import FAMILIES
from hysparse_cli.files.checkpoint import open_checkpoint
from hysparse_cli.model.config import HUB_SHIM_NAME
from tests.conftest import Hysparse
from tests.model import tiny

SMALL = ("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)


def load(folder: Path, **options: Any) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, report = loaded
    assert not any(report.values()), report
    return model.eval()


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    shards = open_checkpoint(folder).shards
    return {name: value for shard in shards for name, value in load_file(shard.path).items()}


def test_the_output_is_a_checkpoint_with_all_that_belongs(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = hysparse("convert", tiny_checkpoint, out, *SMALL, "--ratio", "1:2")
    assert run.exit_code == 0 and run.stderr == ""
    assert "sparse, from 0" in run.stdout and "smaller by" in run.stdout
    dense, ours = open_checkpoint(tiny_checkpoint), open_checkpoint(out)
    for source, copy in zip(dense.shards, ours.shards[:-1], strict=True):
        assert source.path.read_bytes() == copy.path.read_bytes()
    path = "model.layers.{}.self_attn.hysparse.{}"
    names = ("gate.weight", "gate.bias", "sinks")
    new = {path.format(layer, name) for layer in (1, 2) for name in names}
    assert set(ours.tensors) - set(dense.tensors) == new
    written = {str(p.relative_to(out)) for p in out.iterdir() if p.suffix != ".safetensors"}
    assert written == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "hysparse_recipe.yaml",
        "hysparse_report.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        HUB_SHIM_NAME,
    }
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    model = load(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = AutoTokenizer.from_pretrained(out)("w1 w2 w3", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_the_recipe_written_makes_the_same_checkpoint_again(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert (
        hysparse("convert", tiny_checkpoint, first, *SMALL, "--full-layers", "0,2").exit_code == 0
    )
    recipe = first / "hysparse_recipe.yaml"
    assert hysparse("convert", tiny_checkpoint, second, "--recipe", recipe).exit_code == 0
    for path in first.iterdir():
        if path.name != "hysparse_report.json":
            assert path.read_bytes() == (second / path.name).read_bytes()
    assert json.loads((second / "config.json").read_text())["hysparse"]["pattern"] == "FSFF"


def test_json_is_one_object_and_a_dry_run_writes_nothing(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = hysparse("convert", tiny_checkpoint, out, "--dry-run", "--json", *SMALL)
    planned = json.loads(run.stdout)
    assert planned["schema"] == "hysparse.plan/1" and not out.exists()
    assert [layer["served_by"] for layer in planned["layers"]] == [None, 0, 0, None]
    bytes_full = 2 * 512 * 2 * 8 * 4
    assert planned["dense_kv_bytes"]["512"] == 4 * bytes_full
    assert planned["layers"][0]["kv_bytes"]["512"] == bytes_full
    assert planned["layers"][1]["kv_bytes"]["512"] == 2 * 7 * 2 * 8 * 4
    run = hysparse("convert", tiny_checkpoint, out, "--json", *SMALL)
    report = json.loads(run.stdout)
    assert report["schema"] == "hysparse.convert/1" and report["plan"] == planned
    assert report == json.loads((out / "hysparse_report.json").read_text())
    assert sum(report["files"].values()) == open_checkpoint(out).size


@pytest.mark.parametrize("layout", ["hysparse", "hybrid-swa", "full"])
def test_layouts(hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "out"
    assert hysparse("convert", tiny_checkpoint, out, "--layout", layout, *SMALL).exit_code == 0
    new = set(all_tensors(out)) - set(all_tensors(tiny_checkpoint))
    kinds = {name.partition("hysparse.")[2] for name in new}
    gate = {"gate.weight", "gate.bias"}
    expected = {"hysparse": gate | {"sinks"}, "hybrid-swa": {"sinks"}, "full": set()}
    assert kinds == expected[layout]
    model = load(out)
    if layout == "full":
        tokens = torch.arange(40)[None]
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, load(tiny_checkpoint)(tokens).logits)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_max_shard_size_and_dtype_write_weights_anew(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    out = tmp_path / "out"
    limits = ("--max-shard-size", "20KB", "--dtype", dtype)
    assert hysparse("convert", tiny_checkpoint, out, *limits, *SMALL).exit_code == 0
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    ours = all_tensors(out)
    for name, values in all_tensors(tiny_checkpoint).items():
        assert torch.equal(ours[name], values.to(kind))
    assert {values.dtype for values in ours.values()} == {kind}
    shards = open_checkpoint(out).shards
    assert all(shard.size - shard.header_size <= 20_000 for shard in shards) and len(shards) > 3
    assert load(out, dtype="auto").dtype == kind


def test_a_single_file_is_renamed_and_an_all_full_one_is_not(
    hysparse: Hysparse, stories_260k: Path, tmp_path: Path
) -> None:
    assert hysparse("convert", stories_260k, tmp_path / "sparse").exit_code == 0
    names = {path.name for path in (tmp_path / "sparse").glob("*.safetensors")}
    assert names == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert hysparse("convert", stories_260k, tmp_path / "full", "--layout", "full").exit_code == 0
    assert [path.name for path in (tmp_path / "full").glob("model*")] == ["model.safetensors"]
    load(tmp_path / "full")


def test_nan_weights_warn_and_are_counted(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tensor = open_checkpoint(tiny_checkpoint).tensors["model.layers.1.mlp.down_proj.weight"]
    with tensor.shard.open("r+b") as file:
        file.seek(tensor.start + 8)
        file.write(b"\x00\x00\xc0\x7f" * 3)
    run = hysparse("convert", tiny_checkpoint, tmp_path / "out", "--json")
    assert run.exit_code == 0
    assert json.loads(run.stdout)["non_finite"] == {tensor.name: 3}
    assert run.stderr.count("\n") == 1 and "NaN" in run.stderr and tensor.name in run.stderr


WITH_WINDOWS = {"gemma2", "gpt_oss", "ministral", "mistral"}  # in tiny.py's configurations


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_converts_and_loads(
    hysparse: Hysparse, tmp_path: Path, model_type: str
) -> None:
    tiny.dense_model(model_type).float().save_pretrained(tmp_path / "dense")
    run = hysparse("convert", tmp_path / "dense", tmp_path / "out", *SMALL)
    assert run.exit_code == 0
    assert run.stderr.count("\n") == run.stderr.count("sliding window only in the dense model")
    assert bool(run.stderr) is (model_type in WITH_WINDOWS)
    model = load(tmp_path / "out")
    with torch.no_grad():
        assert model(torch.arange(3, 40)[None]).logits.isfinite().all()
