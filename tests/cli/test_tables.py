"""Tables in terminals of 40, 80 and 140 columns: every row has its role, and every figure."""

import json
import shutil
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from hysparse_cli.bench.timing import Timing
from hysparse_cli.convert.ledger import Ledger, Losses
from hysparse_cli.convert.plan import contexts_up_to
from hysparse_cli.evaluate.table import tables
from hysparse_cli.finetune.result import FinetuneResult, Step
from hysparse_cli.start.result import LayerStart, Start
from hysparse_cli.tables import Table
from hysparse_cli.texts.documents import BadRows
from tests.conftest import Hysparse
from tests.evaluate.test_table import _evaluation

WIDTHS = (40, 80, 140)


def shown(table: Any, width: int) -> str:
    console = Console(width=width, file=StringIO())
    console.print(table)
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    return " ".join(" ".join(lines).split())


@pytest.fixture
def deep_model(tiny_original: Path, tmp_path: Path) -> Path:
    """A dense model of 64 layers that reads 1M tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_original, tmp_path / "deep"))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    config = AutoConfig.from_pretrained(tiny_original)
    config.num_hidden_layers, config.layer_types = 64, ["full_attention"] * 64
    config.max_position_embeddings = 1 << 20
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("width", WIDTHS)
def test_a_plan_of_64_layers_keeps_roles_and_figures(
    width: int,
    deep_model: Path,
    hysparse: Hysparse,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    run = hysparse("convert", deep_model, tmp_path / "out", "--dry-run")
    assert run.exit_code == 0 and "…" not in run.stdout
    text = " ".join(run.stdout.replace("│", " ").split())
    assert all(len(line) <= width for line in run.stdout.splitlines())
    assert run.stdout.count("sparse,") == 1 + 47 and run.stdout.count("serves") == 16
    assert "128 MiB" in text and "KV 1024k" in text and "3.76x" in text
    pattern = "FSSS" * 15 + "FSSF"
    folds = [line for line in run.stdout.splitlines() if len(line) > 20 and set(line) <= {*"FS "}]
    assert pattern in run.stdout or "".join(line.strip() for line in folds) == pattern
    assert len(folds) <= 2


def step(number: int) -> Step:
    losses = (1234.5678, 1.5, 0.25, 0.125, 0.0625)
    return Step(number, 1, "distill", *losses, 1e-4, 12345.67, 1000, 1.0, 10**9)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_other_table_keeps_its_figures(width: int) -> None:
    steps = ("selection", "shared KV", "window", "gates and sinks")
    total = tuple(Losses(4.0 + i, 3.0 + i) for i in range(4))
    layers = dict.fromkeys(range(63), total)
    ledger = shown(Ledger(steps, Losses(3.5, 2.5), total, layers, 1000, 50).table(), width)
    assert ledger.count("+0.5000") >= 128 and "62" in ledger
    fits = {
        i: LayerStart(0.1111, 0.2222, 0.3333, 0.4444, (0.5555,), (0.25, 0.75)) for i in range(63)
    }
    start = shown(Start({}, fits).table(), width)
    for figure in ("0.1111", "0.2222", "0.3333", "0.4444", "0.5555"):
        assert start.count(figure) == 63
    run = SimpleNamespace(
        **dict.fromkeys(("checkpoint", "teacher", "out", "device", "dtype"), "a-model"),
        num_processes=1,
        num_trained=10**9,
        tokens_per_second=1.0,
        peak_memory_bytes=10**9,
        steps=[step(i + 1) for i in range(12)],
        bad_rows=BadRows(),
        run=None,
        notes=[],
    )
    finetuned = shown(FinetuneResult(resumed_at=0, seconds=1.0, **vars(run)).table(), width)
    assert finetuned.count("12345.67") == 10 and finetuned.count("0.1250") == 10
    evaluation = _evaluation(0, 0.1, 0.02)
    for score in evaluation.scores:
        object.__setattr__(score, "attention", f"hysparse {'FSSS' * 16}")
    scores = shown(tables(evaluation), width)
    assert "+0.1500 ±0.0447" in scores and "recall@8k" in scores
    assert scores.replace(" ", "").count("FSSS" * 16) == 3


def test_a_table_too_wide_becomes_a_paragraph_for_each_row() -> None:
    table = Table(title="T", caption="below")
    for name in ("layer", "role", "KV 8k"):
        table.add_column(name, no_wrap=True)
    table.add_row("0", "full, serves 1-3", "15.5 KiB")
    assert shown(table, 60).count("│") == 4
    assert shown(table, 24) == "T layer 0; role full, serves 1-3; KV 8k 15.5 KiB below"


def test_kv_is_told_at_lengths_that_the_model_reads(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    assert contexts_up_to(8192) == (8192,) and contexts_up_to(40960) == (8192, 32768, 40960)
    assert contexts_up_to(None) == contexts_up_to(131072) == (8192, 32768, 131072)
    out = tmp_path / "out"
    plan = json.loads(hysparse("convert", tiny_original, out, "--dry-run", "--json").stdout)
    assert list(plan["kv_bytes"]) == list(plan["layers"][0]["kv_bytes"]) == ["512"]
    longer = ("--max-position-embeddings", 16384)
    table = hysparse("convert", tiny_original, out, *longer).stdout
    assert "KV 8k" in table and "KV 16k" in table and "KV 32k" not in table
    card = (out / "README.md").read_text()
    assert "| 8k |" in card and "| 16k |" in card and "| 32k |" not in card


def test_one_measurement_has_no_spread() -> None:
    assert str(Timing([20.0])) == "20.0"
    assert str(Timing([19.0, 21.0])) == "20.0 ±5%"
