"""``hysparse convert --strategy``: what is chosen, what the score file saves, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hysparse_cli.pattern import uniform
from tests.conftest import Hysparse
from tests.model import tiny

SMALL = ("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)
TEXT = ("--calibration-tokens", 512, "--set", "convert.calibration_sequence_tokens=256")


def chosen(run: Any) -> Any:
    assert run.exit_code == 0, run.stderr
    return json.loads(run.stdout)["plan"]["selection"]


@pytest.mark.parametrize("strategy", ["dp", "greedy", "kl"])
def test_a_strategy_places_as_many_full_layers_as_uniform(
    hysparse: Hysparse, stories_260k: Path, tmp_path: Path, strategy: str
) -> None:
    out = tmp_path / "out"
    options = ("--strategy", strategy, "--ratio", "1:2", *SMALL, *TEXT)
    selection = chosen(hysparse("convert", stories_260k, out, "--json", *options))
    assert selection["uniform_pattern"] == "FSSFF"
    pattern = selection["pattern"]
    assert pattern[0] == pattern[-1] == "F" and pattern.count("F") == 3
    config = json.loads((out / "config.json").read_text())
    assert config["hysparse"]["pattern"] == pattern
    report = json.loads((out / "hysparse_report.json").read_text())
    assert report["plan"]["selection"] == selection
    if strategy == "dp":  # the best of all by its own measure
        assert selection["score"] >= selection["uniform_score"]
    recipe = (out / "hysparse_recipe.yaml").read_text()
    assert f"pattern: {pattern}" in recipe
    again = tmp_path / "again"
    recipe_file = ("--recipe", out / "hysparse_recipe.yaml")
    assert hysparse("convert", stories_260k, again, *recipe_file).exit_code == 0
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_another_ratio_is_planned_from_the_file_without_the_model(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = tmp_path / "scores.json"
    options = ("--dry-run", "--json", "--scores", scores, *SMALL)
    plans = {}
    for strategy in ("greedy", "dp", "kl"):
        run = hysparse(
            "convert", tiny_original, tmp_path / "out", "--strategy", strategy, *options, *TEXT
        )
        plans[strategy] = json.loads(run.stdout)
    before = scores.read_bytes()

    def no_load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("hysparse_cli.convert.decide.load_to_measure", no_load)
    for strategy, planned in plans.items():
        again = hysparse(
            "convert", tiny_original, tmp_path / "out", "--strategy", strategy, *options
        )
        assert json.loads(again.stdout) == planned
        other = hysparse(
            "convert",
            tiny_original,
            tmp_path / "out",
            "--strategy",
            strategy,
            *options,
            "--ratio",
            "1:1",
        )
        assert json.loads(other.stdout)["selection"]["pattern"].count("F") == 3
    assert scores.read_bytes() == before and not (tmp_path / "out").exists()


def test_the_file_has_every_uniform_pattern_that_a_ratio_gives(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    config = tiny.dense_config("llama", num_hidden_layers=10)
    AutoModelForCausalLM.from_config(config).save_pretrained(dense)  # type: ignore[no-untyped-call]
    AutoTokenizer.from_pretrained(tiny_original).save_pretrained(dense)
    options = ("--strategy", "greedy", "--dry-run", "--json", *SMALL, *TEXT)
    for sparse in (4, 5, 6, 7):  # four patterns of three full layers; a path tries two
        run = hysparse("convert", dense, tmp_path / "out", *options, "--ratio", f"1:{sparse}")
        assert run.exit_code == 0, run.stderr
        selection = json.loads(run.stdout)["selection"]
        assert selection["pattern"].count("F") == selection["uniform_pattern"].count("F")


def test_scoring_repeats_bit_by_bit(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    files = []
    for name in ("a", "b"):
        out = tmp_path / name
        options = ("--strategy", "greedy", "--dry-run", *SMALL, *TEXT)
        assert hysparse("convert", tiny_original, out, *options).exit_code == 0
        files.append((tmp_path / f"{name}.scores.json").read_bytes())
    assert files[0] == files[1]


def test_the_table_shows_the_strategy_beside_uniform(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    options = ("--strategy", "dp", "--dry-run", *SMALL, *TEXT)
    run = hysparse("convert", tiny_original, tmp_path / "out", *options)
    shown = " ".join(run.stdout.split())
    assert "overlap kept, less damage: dp F" in shown and "uniform FSSF" in shown
    assert "not better than uniform" in shown  # of four layers there is one such pattern


def test_scores_of_another_model_or_of_other_options_are_refused(
    hysparse: Hysparse, tiny_original: Path, stories_260k: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "scores.json"
    options = ("--strategy", "dp", "--dry-run", "--scores", scores)
    out = tmp_path / "out"
    assert hysparse("convert", tiny_original, out, *options, *SMALL, *TEXT).exit_code == 0
    run = hysparse("convert", stories_260k, out, *options, *SMALL)
    assert run.exit_code == 3 and "of another model" in run.stderr
    run = hysparse("convert", tiny_original, out, *options, *SMALL[:-1], 16)
    assert run.exit_code == 3 and "window_tokens 8, not 16" in run.stderr
    run = hysparse("convert", tiny_original, out, *options, *SMALL, "--calibration-tokens", 256)
    assert run.exit_code == 3 and "calibration_tokens 512, not 256" in run.stderr
    scores.write_text('{"schema": "hysparse.scores/1"}')
    run = hysparse("convert", tiny_original, out, *options, *SMALL)
    assert run.exit_code == 7 and "is no file of hysparse.scores/1" in run.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--strategy", "best"), "'uniform', 'manual', 'dp', 'greedy' or 'kl'"),
        (("--strategy", "dp", "--pattern", "FSSF"), "strategy dp and pattern do not go together"),
        (("--strategy", "manual"), "strategy manual and no pattern"),
        (("--strategy", "kl", "--layout", "hybrid-swa"), "shares nothing"),
        (("--strategy", "greedy", "--no-last-layer-full"), "keeps the last layer full"),
        (("--scores", "file.json"), "scores are of a strategy that measures"),
        (("--fit", "1GiB", "--ratio", "1:3"), "ratio and fit both place"),
        (("--batch", "8"), "give fit"),
        (("--fit", "much"), "not a size such as"),
        (("--fit", "1GiB", "--context", "1k,2k"), "not one length"),
        (("--fit", "1GiB", "--no-last-layer-full"), "neither with layout full nor with"),
        (("--fit", "1KB"), "only 2 of 4 layers full"),
        (("--strategy", "dp", "--scores", "nowhere/file.json"), "there is no folder nowhere"),
        (("--strategy", "dp", *TEXT[:3], "convert.calibration_sequence_tokens=1024"), "is longer"),
        (("--strategy", "dp", "--calibration", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_can_not_be_planned_is_one_line(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    run = hysparse("convert", tiny_original, tmp_path / "out", "--dry-run", *options)
    assert run.exit_code in (3, 7) and run.stdout == ""
    assert run.stderr.count("\n") == 1 and words in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_refused(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from hysparse_cli.files.checkpoint import open_checkpoint

    tensor = open_checkpoint(tiny_checkpoint).tensors["model.layers.1.mlp.down_proj.weight"]
    with tensor.shard.open("r+b") as file:
        file.seek(tensor.start + 8)
        file.write(b"\x00\x00\xc0\x7f" * 3)
    options = ("--strategy", "dp", "--dry-run", *SMALL, *TEXT)
    run = hysparse("convert", tiny_checkpoint, tmp_path / "out", *options)
    assert run.exit_code == 7 and "NaN or infinity on the calibration text" in run.stderr
    assert not (tmp_path / "out.scores.json").exists()


def test_fit_places_the_most_full_layers_that_fit(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    def planned(budget: int, *more: object) -> Any:
        fit = ("--fit", budget, "--context", 512, "--batch", 8)
        run = hysparse(
            "convert", tiny_original, tmp_path / "out", "--dry-run", "--json", *SMALL, *fit, *more
        )
        assert run.exit_code == 0, run.stderr
        return json.loads(run.stdout)

    generous = planned(1 << 30)
    assert generous["hysparse"]["pattern"] == "FFFF" and generous["fit"]["num_full"] == 4
    full = generous["fit"]["weight_bytes"] + generous["fit"]["kv_bytes"]
    assert generous["fit"]["kv_bytes"] == 8 * 4 * 2 * 512 * 2 * 8 * 4
    less = planned(full - 1)
    assert less["hysparse"]["pattern"].count("F") == less["fit"]["num_full"] == 3
    assert less["fit"]["weight_bytes"] + less["fit"]["kv_bytes"] < full
    scored = planned(full - 1, "--strategy", "dp", *TEXT)
    assert scored["selection"]["pattern"].count("F") == 3
    assert scored["selection"]["uniform_pattern"] == less["hysparse"]["pattern"]
    fit = ("--fit", "1GB", "--context", "4k")
    run = hysparse("convert", tiny_original, tmp_path / "out", "--dry-run", *fit)
    assert "4 of 4 layers full fit" in " ".join(run.stdout.split())
    assert "more than the 512 tokens that the dense model reads" in run.stderr


def test_uniform_has_as_many_full_layers_as_asked_and_is_the_papers_where_a_ratio_is() -> None:
    for num_layers in (1, 2, 5, 12, 13):
        for num_full in range(min(2, num_layers), num_layers + 1):
            assert uniform(num_full, num_layers).pattern.count("F") == num_full
    assert uniform(4, 12).pattern == "FSSSFSSSFSSF"
