"""--swap-attention: on disk as in memory, for every family; what is swapped by itself; refusals."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hysparse_cli.convert.run import execute, plan
from hysparse_cli.convert.swaps import Pair, swap_in_place
from hysparse_cli.evaluate.perplexity import token_losses
from hysparse_cli.families import FAMILIES, family_of
from hysparse_cli.files.checkpoint import open_checkpoint
from hysparse_cli.files.source import locate
from hysparse_cli.model.config import HysparseSpec, spec_of
from hysparse_cli.model.modeling import install
from hysparse_cli.placement.far_context import (
    LEAST_GAIN,
    MOST_LAYERS_APART,
    choose_swaps,
    measure_need,
)
from hysparse_cli.recipe import ConvertOptions
from hysparse_cli.texts.calibration import CalibrationText
from tests.conftest import Hysparse
from tests.convert.test_convert import all_tensors, load
from tests.model.tiny import VOCAB_SIZE, dense_model

SIZES = ("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)
CALIBRATION = (
    *("--set", "convert.calibration_tokens=512"),
    *("--set", "convert.calibration_sequence_tokens=256"),
)
SWAPPABLE = [name for name, family in FAMILIES.items() if family.attention_norms is not None]
STUCK = ["cohere", "phi"]
LONG = torch.randint(3, VOCAB_SIZE, (1, 90), generator=torch.Generator().manual_seed(0))  # > window


@torch.no_grad()
def logits(model: Any, x: Tensor = LONG) -> Tensor:
    found: Tensor = model(x, use_cache=False).logits
    return found


def saved(model_type: str, folder: Path) -> Path:
    dense_model(model_type).float().save_pretrained(folder)
    return folder


def swapped(folder: Path, *pairs: Pair) -> Any:
    """The dense model of ``folder``, swapped in memory."""
    model = load(folder)
    swap_in_place(model, pairs, family_of(model.config.model_type))
    return model


def convert(folder: Path, out: Path, *pairs: Pair, **options: Any) -> Path:
    chosen = ConvertOptions(swap_attention=[list(pair) for pair in pairs], **options)
    execute(plan(locate(str(folder)), chosen), out, lambda done, total: None)
    return out


@pytest.mark.parametrize(
    ("need", "pattern", "pairs"),
    [
        ([0, 0, 1, 0, 0], "FFSFF", ((1, 2),)),  # two as near and as good: the earlier
        ([0, 0.2, 1, 0.1, 0], "FFSFF", ((3, 2),)),  # as near: the one that needs less
        ([0, 0, 0.2, 1, 0.1], "FFFSF", ((4, 3),)),
        ([0, 1, 0, 0, 0, 0], "FSSSSF", ()),  # 4 apart, and layer 0 never
        ([0, 0, 1, 0, 0, 0], "FSSSSF", ((5, 2),)),
        ([0, 1, 0.5, 0], "FSSF", ((3, 1),)),  # the greater need takes the only free layer
        ([0, 0.5, 1, 0], "FSSF", ((3, 2),)),
        ([0, 1, 1, 0], "FSSF", ((3, 1),)),  # alike: the earlier
        ([0, 1, 0.9, 0, 0.05], "FSSFF", ((3, 1), (4, 2))),
        ([0, 0, 1, 1.0 - LEAST_GAIN, 0], "FSSFS", ()),  # the gain must be more than the least
        ([0, 0, 1, 0.99 - LEAST_GAIN, 0], "FSSFS", ((3, 2),)),
        ([0, 0, 0, 0, 0.09, 1], "FSSFSF", ()),  # little, next to the greatest need
        ([0, 0, 1, 0, 1], "FSSSF", ()),  # the full layer needs it as much
        ([0, 0, 0], "FSF", ()),
        ([0, -1, 0], "FSF", ()),
        ([0, 1, 1], "FFF", ()),
        ([0, 1, 1], "FSS", ()),
    ],
)
def test_attention_that_needs_far_context_goes_to_full_layers(
    need: list[float], pattern: str, pairs: tuple[Pair, ...]
) -> None:
    assert choose_swaps(need, pattern) == pairs
    assert MOST_LAYERS_APART == 3


@pytest.mark.parametrize("model_type", FAMILIES)
def test_norms_that_move_are_of_the_attention_alone_and_all_of_them(model_type: str) -> None:
    """With its attention silent, a layer reads just the norms that do not move with it."""
    model, family = dense_model(model_type), FAMILIES[model_type]
    attention = model.get_submodule(family.attention.format(layer=1))
    with torch.no_grad():
        for parameter in attention.get_submodule(family.output).parameters():
            parameter.zero_()
    silent, unread = logits(model), []
    for name, norm in model.get_submodule(family.layer.format(layer=1)).named_children():
        if "norm" not in name:
            continue
        handle = norm.register_forward_hook(lambda module, args, output: 1.5 * output)
        if logits(model).equal(silent):
            unread.append(name)
        handle.remove()
    assert sorted(unread) == sorted(family.attention_norms or ())


@pytest.mark.parametrize("model_type", SWAPPABLE)
def test_on_disk_as_in_memory_and_back(model_type: str, tmp_path: Path) -> None:
    dense = saved(model_type, tmp_path / "dense")
    out = convert(dense, tmp_path / "out", (1, 2), (4, 3), layout="full")
    expected, ours = load(dense), load(out)
    before = logits(expected)
    swap_in_place(expected, ((1, 2), (4, 3)), FAMILIES[model_type])
    after = logits(expected)
    assert logits(ours).equal(after) and (after - before).abs().max() > 1e-3
    swap_in_place(ours, ((2, 1), (3, 4)), FAMILIES[model_type])
    assert logits(ours).equal(before)
    layers = [family_of(model_type).attention.format(layer=i) for i in range(5)]
    assert [ours.get_submodule(layer).layer_idx for layer in layers] == list(range(5))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "gpt_neox", "qwen3"])
def test_sparse_layers_are_those_of_the_swapped_model(model_type: str, tmp_path: Path) -> None:
    sizes = {"block_size": 8, "top_k_tokens": 16, "window_tokens": 8}
    dense = saved(model_type, tmp_path / "dense")
    out = convert(dense, tmp_path / "out", (2, 1), (4, 3), pattern="FSFSF", **sizes)
    ours, expected = load(out), swapped(dense, (2, 1), (4, 3))
    spec = spec_of(ours.config)
    assert spec is not None and spec.swapped == ((2, 1), (4, 3))
    install(expected, spec)
    new = {name: value for name, value in ours.named_parameters() if ".hysparse." in name}
    for name, value in new.items():
        expected.get_parameter(name).data = value.data
    assert len(new) == 6 and logits(ours).equal(logits(expected))
    past = ours(LONG[:, :-1], use_cache=True).past_key_values
    step = ours(LONG[:, -1:], past_key_values=past).logits
    assert (step[:, 0] - logits(ours)[:, -1]).abs().max() < 1e-4


def test_a_window_goes_where_its_attention_goes(tmp_path: Path) -> None:
    dense = saved("gemma2", tmp_path / "dense")  # a window in layers 0, 2 and 4
    planned = plan(locate(str(dense)), ConvertOptions(pattern="FSFSF", swap_attention=[[2, 3]]))
    assert planned.widened == (0, 4)
    full = plan(locate(str(dense)), ConvertOptions(layout="full", swap_attention=[[2, 3]]))
    assert full.kv.windows == (64, None, None, 64, 64) and full.widened == ()
    assert full.dense_kv.windows == (64, None, 64, None, 64)


def test_only_shards_of_swapped_attention_are_written_anew(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = convert(tiny_checkpoint, tmp_path / "out", (0, 3), pattern="FSSF")
    dense, ours = open_checkpoint(tiny_checkpoint), open_checkpoint(out)
    kept = 0
    for source, copy in zip(dense.shards, ours.shards[:-1], strict=True):
        moved = any(_is_moved(tensor.name, (0, 3)) for tensor in source.tensors)
        same = source.path.read_bytes() == copy.path.read_bytes()
        assert same is not moved
        kept += same
    assert 0 < kept < len(dense.shards)
    before, after = all_tensors(tiny_checkpoint), all_tensors(out)
    places = {"layers.0.": "layers.3.", "layers.3.": "layers.0."}
    for name, value in before.items():
        if _is_moved(name, (0, 3)):
            here = next(place for place in places if place in name)
            name = name.replace(here, places[here])
        assert after[name].equal(value)


def _is_moved(name: str, layers: Pair) -> bool:
    parts = (".self_attn.", ".input_layernorm.")
    return any(f"layers.{layer}{part}" in name for layer in layers for part in parts)


@pytest.mark.parametrize("init", ["copy", "aligned"])
def test_measuring_sees_the_swapped_model(
    init: str, hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """All is as if the dense checkpoint had been swapped before, but the ledger says so."""
    before = tmp_path / "before"
    before.mkdir()
    for path in tiny_checkpoint.iterdir():
        if path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
            (before / path.name).write_bytes(path.read_bytes())
    swapped(tiny_checkpoint, (2, 1)).save_pretrained(before)
    options = (*SIZES, *CALIBRATION, "--pattern", "FSFS", "--init", init, "--explain", "--json")
    runs = [
        hysparse("convert", before, tmp_path / "expected", *options),
        hysparse("convert", tiny_checkpoint, tmp_path / "out", *options, "--swap-attention", "2:1"),
    ]
    assert [run.exit_code for run in runs] == [0, 0]
    expected, ours = (json.loads(run.stdout)["plan"] for run in runs)
    assert ours["start"] == expected["start"]
    swap = {"step": "swapped attention", **expected["ledger"]["dense"]}
    assert ours["ledger"]["steps"] == [swap, *expected["ledger"]["steps"]]
    for layer, steps in expected["ledger"]["by_layer"].items():
        assert ours["ledger"]["by_layer"][layer] == [expected["ledger"]["dense"], *steps]
    plain = hysparse("convert", tiny_checkpoint, tmp_path / "plain", *options, "--dry-run")
    assert ours["ledger"]["dense"] == {
        kind: pytest.approx(loss, abs=1e-6)
        for kind, loss in json.loads(plain.stdout)["ledger"]["dense"].items()
    }
    assert ours["ledger"]["dense"] != expected["ledger"]["dense"]
    assert ours["swaps"] == {"pairs": [[2, 1]], "need": None} and expected["swaps"] is None
    tensors = [all_tensors(tmp_path / name) for name in ("expected", "out")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(value.equal(tensors[1][name]) for name, value in tensors[0].items())


def test_need_is_what_a_window_alone_costs() -> None:
    rows = LONG[:, :40].repeat(2, 1)
    rows[1] = rows[1].flip(0)
    answers = torch.zeros_like(rows, dtype=torch.bool)
    answers[0, 30:34] = answers[1, 20:21] = True
    dense = dense_model("llama")
    losses = token_losses(dense, rows).double()
    base = losses[answers[:, 1:]].mean(), losses.mean()
    expected = []
    for layer in range(1, 5):
        alone = dense_model("llama")
        install(alone, HysparseSpec(_sparse_at(layer), layout="hybrid-swa", window_tokens=8))
        for name, parameter in alone.double().named_parameters():
            if name.endswith("hysparse.sinks"):
                parameter.data.fill_(-10.0)
        losses = token_losses(alone, rows).double()
        expected.append((losses[answers[:, 1:]].mean() - base[0], losses.mean() - base[1]))
    seen: list[tuple[int, int]] = []
    for kind, asked in enumerate([answers, torch.zeros_like(answers)]):
        seen.clear()
        text = CalibrationText(rows, asked)
        need = measure_need(dense_model("llama"), text, 8, lambda *at: seen.append(at))
        by_hand = [0.0, *(float(changes[kind]) for changes in expected)]
        assert need == pytest.approx(by_hand, abs=1e-9)
        assert min(map(abs, need[1:])) > 1e-6
    assert seen == [(done, 10) for done in range(11)]


def _sparse_at(layer: int) -> str:
    return "".join("S" if i == layer else "F" for i in range(5))


@pytest.fixture
def auto(hysparse: Hysparse, stories_260k: Path, tmp_path: Path) -> Iterator[Path]:
    options = (*SIZES, *CALIBRATION, "--pattern", "FSFSF", "--swap-attention", "auto")
    run = hysparse("convert", stories_260k, tmp_path / "auto", *options)
    assert run.exit_code == 0, run.stderr
    assert "attention swapped: " in run.stdout
    assert "layers that need far context most" in " ".join(run.stdout.split())
    yield tmp_path / "auto"


def test_auto_is_saved_as_what_it_chose(
    hysparse: Hysparse, auto: Path, stories_260k: Path, tmp_path: Path
) -> None:
    report = json.loads((auto / "hysparse_report.json").read_text())["plan"]["swaps"]
    need = report["need"]
    assert need[0] == 0 and len(need) == 5 and len(set(need)) == 5
    pairs = [list(pair) for pair in choose_swaps(need, "FSFSF")]
    assert pairs and report["pairs"] == pairs
    assert json.loads((auto / "config.json").read_text())["hysparse"]["swapped"] == pairs
    recipe = auto / "hysparse_recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["convert"]["swap_attention"] == pairs
    again = hysparse("convert", stories_260k, tmp_path / "again", "--recipe", recipe)
    assert again.exit_code == 0 and "far context" not in again.stdout
    first, second = all_tensors(auto), all_tensors(tmp_path / "again")
    assert first.keys() == second.keys() and all(first[n].equal(second[n]) for n in first)
    row = ", ".join(f"layer {a} with {b}" for a, b in pairs)
    assert f"\n| attention swapped | {row} |\n" in (auto / "README.md").read_text()


def test_auto_refuses_weights_that_give_no_numbers(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = load(tiny_checkpoint)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.nan)
    for shard in tiny_checkpoint.glob("*.safetensors*"):
        shard.unlink()
    model.save_pretrained(tiny_checkpoint)
    options = (*SIZES, *CALIBRATION, "--swap-attention", "auto")
    run = hysparse("convert", tiny_checkpoint, tmp_path / "out", *options)
    assert run.exit_code == 7 and run.stderr.count("\n") == 1 and "NaN or infinity" in run.stderr
    assert not (tmp_path / "out").exists()


def test_config_keeps_the_swaps_and_old_ones_have_none(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = convert(tiny_checkpoint, tmp_path / "out", (0, 3), (2, 1), pattern="FSSF")
    load(out).save_pretrained(tmp_path / "saved")
    for folder in (out, tmp_path / "saved"):
        spec = spec_of(AutoConfig.from_pretrained(folder))
        assert spec is not None and spec.swapped == ((0, 3), (2, 1))
    config = json.loads((out / "config.json").read_text())
    del config["hysparse"]["swapped"]
    (out / "config.json").write_text(json.dumps(config))
    spec = spec_of(AutoModelForCausalLM.from_pretrained(out).config)
    assert spec is not None and spec.swapped == ()


def test_without_swaps_the_card_says_nothing_of_them(tiny_converted: Path) -> None:
    assert "swapped" not in (tiny_converted / "README.md").read_text()


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ("3:4", "swap_attention 3:4 has 4, but the model's layers are 0 to 3"),
        ("1:2,2:3", "swap_attention 1:2,2:3 names a layer twice"),
        ("1:1", "names a layer twice"),
        ("1", "swap_attention: neither auto nor pairs of layers such as 8:9,10:11 (got '1')"),
        ("1:2:3", "neither auto nor pairs"),
        ("-1:2", "neither auto nor pairs"),
        ("1:2,", "neither auto nor pairs"),
        ("", "neither auto nor pairs"),
    ],
)
def test_bad_pairs_are_refused_in_a_line(
    pairs: str, reason: str, hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    run = hysparse("convert", tiny_original, tmp_path / "out", f"--swap-attention={pairs}")
    assert run.exit_code == 3 and run.stderr.count("\n") == 1 and reason in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pairs", ["[[1, 2, 3]]", "[[1]]", "[1, 2]", "[[-1, 2]]", "all"])
def test_bad_pairs_of_a_recipe_are_refused(
    pairs: str, hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"convert:\n  swap_attention: {pairs}\n")
    run = hysparse("convert", tiny_original, tmp_path / "out", "--recipe", recipe)
    assert run.exit_code == 3 and "swap_attention" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", STUCK)
@pytest.mark.parametrize("pairs", ["1:2", "auto"])
def test_families_whose_mlp_reads_the_same_norm_are_refused(
    pairs: str, model_type: str, hysparse: Hysparse, tmp_path: Path
) -> None:
    assert sorted(FAMILIES.keys() - set(SWAPPABLE)) == STUCK
    dense = saved(model_type, tmp_path / "dense")
    run = hysparse("convert", dense, tmp_path / "out", "--swap-attention", pairs)
    assert run.exit_code == 4 and run.stderr.count("\n") == 1
    assert f"in {model_type} models attention and MLP read the same norm" in run.stderr
    assert not (tmp_path / "out").exists()


def test_finetuning_keeps_what_is_said_of_swaps_and_refuses_to_align_them(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    data = tmp_path / "text.txt"
    data.write_text("w1 w2 w3 w4 " * 100)
    dense = convert(tiny_original, tmp_path / "swapped", (3, 2), pattern="FSSF", window_tokens=8)
    common = ("--data", data, "--teacher", tiny_original, "--set", "finetune.sequence_tokens=32")
    stage = "--set=finetune.stages=[{{objective: {}, steps: 1}}]"
    out = tmp_path / "healed"
    run = hysparse("finetune", dense, out, *common, stage.format("align"))
    assert run.exit_code == 3 and run.stderr.count("\n") == 1
    assert "layers 3 and 2 hold attention that was swapped" in run.stderr and not out.exists()
    run = hysparse("finetune", dense, out, *common, stage.format("distill"))
    assert run.exit_code == 0, run.stderr
    report = json.loads((out / "hysparse_report.json").read_text())
    assert report["plan"]["swaps"]["pairs"] == [[3, 2]]
    assert "| attention swapped | layer 3 with 2 |" in (out / "README.md").read_text()
    spec = spec_of(AutoConfig.from_pretrained(out))
    assert spec is not None and spec.swapped == ((3, 2),)
