"""Converting with measured tensors: what is written anew, and what still goes byte for byte."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hysparse_cli.convert.decide import INITS, Measured
from hysparse_cli.convert.dense import read_dense
from hysparse_cli.convert.plan import plan
from hysparse_cli.convert.write import execute
from hysparse_cli.files.checkpoint import open_checkpoint
from hysparse_cli.files.source import locate
from hysparse_cli.recipe import ConvertOptions
from hysparse_cli.start.result import Start
from tests.conftest import Hysparse
from tests.convert.test_convert import all_tensors, load

SMALL = {"block_size": 8, "top_k_tokens": 16, "window_tokens": 8}
CALIBRATION = (
    *("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8),
    *("--set", "convert.calibration_tokens=512"),
    *("--set", "convert.calibration_sequence_tokens=256"),
)


def converted(folder: Path, out: Path, tensors: dict[str, torch.Tensor], **options: Any) -> None:
    """Convert ``folder`` with these tensors as the measured start."""
    planned = plan(read_dense(locate(str(folder))), ConvertOptions(**SMALL, **options))
    measured = Measured(Start(tensors, {}), None)
    execute(replace(planned, measured=measured), out, lambda done, total: None)


def new_values(folder: Path, *names: str) -> dict[str, torch.Tensor]:
    stored = all_tensors(folder)
    return {name: torch.randn(stored[name].shape, dtype=torch.float64) for name in names}


O_PROJ, GATE = "model.layers.{}.self_attn.o_proj.weight", "model.layers.1.self_attn.hysparse.gate"


def test_only_shards_with_a_changed_tensor_are_written_anew(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    changed = new_values(tiny_checkpoint, O_PROJ.format(1))
    new = {f"{GATE}.bias": torch.randn(8), f"{GATE}.weight": torch.randn(8, 32)}
    converted(tiny_checkpoint, tmp_path / "out", changed | new)
    dense, ours = open_checkpoint(tiny_checkpoint), open_checkpoint(tmp_path / "out")
    anew = []
    for source, copy in zip(dense.shards, ours.shards[:-1], strict=True):
        assert [t.name for t in source.tensors] == [t.name for t in copy.tensors]
        if source.path.read_bytes() != copy.path.read_bytes():
            anew.append(source.path.name)
    assert anew == [dense.tensors[O_PROJ.format(1)].shard.name]
    expected = all_tensors(tiny_checkpoint) | {n: v.float() for n, v in (changed | new).items()}
    found = all_tensors(tmp_path / "out")
    same = {name for name, values in expected.items() if found[name].equal(values)}
    assert same == expected.keys()
    assert {n for n in found.keys() - same if found[n].unique().numel() != 1} == set()
    assert (
        load(tmp_path / "out")
        .model.layers[1]
        .self_attn.o_proj.weight.equal(changed[O_PROJ.format(1)].float())
    )


def test_a_single_file_is_written_anew_with_what_changed(
    stories_260k: Path, tmp_path: Path
) -> None:
    changed = new_values(stories_260k, O_PROJ.format(2))
    converted(stories_260k, tmp_path / "out", changed)
    assert {path.name for path in (tmp_path / "out").glob("model*")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    found = all_tensors(tmp_path / "out")
    for name, values in all_tensors(stories_260k).items():
        assert found[name].equal(changed[name].float() if name in changed else values)
    load(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_weights_written_anew_take_what_changed(
    tiny_checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    changed = new_values(tiny_checkpoint, O_PROJ.format(1), O_PROJ.format(2))
    converted(tiny_checkpoint, tmp_path / "out", changed, dtype=dtype, max_shard_size="20KB")
    kind = torch.float32 if dtype == "auto" else torch.bfloat16
    found = all_tensors(tmp_path / "out")
    for name, values in (all_tensors(tiny_checkpoint) | changed).items():
        assert found[name].equal(values.to(kind))


def test_a_measured_tensor_that_is_not_finite_is_counted(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    converted(tiny_checkpoint, tmp_path / "out", {f"{GATE}.bias": torch.full((8,), torch.nan)})
    report = json.loads((tmp_path / "out" / "hysparse_report.json").read_text())
    assert report["non_finite"] == {f"{GATE}.bias": 8}


@pytest.mark.parametrize("init", INITS)
def test_every_start_converts_and_reports(
    init: str, hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = hysparse("convert", tiny_checkpoint, out, "--init", init, *CALIBRATION)
    assert run.exit_code == 0 and run.stderr == "" and "worst head" in run.stdout
    start = json.loads((out / "hysparse_report.json").read_text())["plan"]["start"]
    assert list(start) == ["1", "2"] and len(start["1"]["by_head"]) == 4
    assert all(fit["fitted"] < fit["half"] for fit in start.values())
    assert load_file(open_checkpoint(out).tensors[f"{GATE}.bias"].shard)[f"{GATE}.bias"].std() > 0
    recipe = out / "hysparse_recipe.yaml"
    again = hysparse("convert", tiny_checkpoint, tmp_path / "again", "--recipe", recipe)
    assert again.exit_code == 0
    first, second = all_tensors(out), all_tensors(tmp_path / "again")
    assert first.keys() == second.keys() and all(first[n].equal(second[n]) for n in first)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize("switch", ["layout=hybrid-swa", "window_kv=none", "pattern=FFFF"])
def test_without_two_branches_nothing_is_measured(
    switch: str, hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    without_tokenizer(tiny_checkpoint)  # so that measuring would fail
    options = ("--set", f"convert.{switch}", "--init", "copy", *CALIBRATION)
    assert hysparse("convert", tiny_checkpoint, tmp_path / "out", *options).exit_code == 0


def test_without_a_tokenizer_a_measured_start_is_refused_in_a_line(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    without_tokenizer(tiny_checkpoint)
    run = hysparse("convert", tiny_checkpoint, tmp_path / "out", "--init", "copy", *CALIBRATION)
    assert run.exit_code == 7 and run.stderr.count("\n") == 1 and "no tokenizer" in run.stderr
    assert not (tmp_path / "out").exists()
    assert hysparse("convert", tiny_checkpoint, tmp_path / "out", *CALIBRATION).exit_code == 0


def test_rows_longer_than_the_model_reads_are_refused_in_a_line(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    length = ("--set", "convert.calibration_sequence_tokens=513")
    run = hysparse("convert", tiny_checkpoint, tmp_path / "out", "--init", "copy", *length)
    assert run.exit_code == 3 and run.stderr.count("\n") == 1
    assert "513 is longer than the model reads: at most 512" in run.stderr


def test_the_recipe_knows_the_starts() -> None:
    for init in ("constant", *INITS):
        assert ConvertOptions(init=init).init == init  # type: ignore[arg-type]
