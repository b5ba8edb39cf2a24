"""Conversions killed and interrupted at random moments: nothing of anybody's is ever lost.

After each, OUT is what it was or a whole checkpoint; after the next run there is nothing else.
"""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hysparse_cli.convert.dense import read_dense
from hysparse_cli.convert.plan import plan
from hysparse_cli.convert.table import conversion_table
from hysparse_cli.convert.write import execute
from hysparse_cli.files.checkpoint import open_checkpoint
from hysparse_cli.files.leftovers import recover
from hysparse_cli.files.source import Source
from hysparse_cli.recipe import ConvertOptions
from tests.forked import Child, command, fork

RUNS = 200
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# SIGTERM as such ends a process in which main() has not begun, or has ended
ENDS = {0, 3, 129, 130, 143, -signal.SIGKILL, -signal.SIGHUP, -signal.SIGTERM}
OLD = {"config.json": '{"model_type": "llama"}', "README.md": "old"}
FOREIGN = {**OLD, "thesis.tex": "precious", "src/main.py": "precious"}
CASES = {
    "fresh": ({}, (), 1),
    "over an old checkpoint": (OLD, ("--overwrite",), 1),
    "over foreign files": (FOREIGN, ("--overwrite",), 1),
    "two at once": ({}, (), 2),
    "two at once over an old checkpoint": (OLD, ("--overwrite",), 2),
    "foreign files that appear meanwhile": ({}, ("--overwrite",), 1),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(num_hidden_layers=6, num_attention_heads=4, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200KB")
    planned = plan(read_dense(Source("dense", folder)), ConvertOptions())
    conversion_table(execute(planned, folder.parent / "imports what forks need", lambda *_: None))
    return folder


@pytest.mark.long
def test_killed_at_any_moment_out_is_what_it_was_or_whole(dense: Path, tmp_path: Path) -> None:
    chance, ended, became = random.Random(0), Counter[str](), Counter[str]()
    longest = _seconds(dense, tmp_path)
    for number in range(RUNS):
        what = list(CASES)[number % len(CASES)]
        held, flags, at_once = CASES[what]
        place = tmp_path / str(number)
        out = place / "out"
        place.mkdir()
        _write(out, held)
        runs = [
            fork(command("convert", dense, out, *flags, write_seconds=0.001), said)
            for said in _folders(tmp_path, number, at_once)
        ]
        while not all(run.stderr.exists() for run in runs):
            time.sleep(0.001)
        time.sleep(chance.uniform(0.01, 1.1 * longest))
        if what.startswith("foreign files that appear") and not out.exists():
            _write(out, held := {"thesis.tex": "precious"})
        for run in runs:
            _send(run, chance.choice(SIGNALS))
        for run in runs:
            found = run.end()
            ended[str(found.exit_code)] += 1
            assert found.exit_code in ENDS, (number, what, found)
            assert "Traceback" not in found.stderr, (number, what, found)
        became[f"{what}: {_judge(number, out, held, dense)}"] += 1
    print(f"\n{RUNS} cases: exit codes {dict(ended)}; {dict(became)}")


def _judge(number: int, out: Path, held: dict[str, str], dense: Path) -> str:
    """What OUT is after a run that sees what was left, by which nothing else may be left."""
    recover(out)
    assert {path.name for path in out.parent.iterdir()} <= {"out"}, (number, held)
    if out.exists() and held and _content(out) == held:
        return "as it was"
    if not out.exists():
        assert not held, number
        return "absent"
    assert not {"thesis.tex", "src/main.py"} & held.keys(), number
    assert set(open_checkpoint(out).tensors) > set(open_checkpoint(dense).tensors), number
    assert (out / "hysparse_report.json").exists(), number
    return "whole"


def _folders(tmp_path: Path, number: int, count: int) -> list[Path]:
    """Folders for what ``count`` runs say."""
    folders = [tmp_path / f"said {number} {i}" for i in range(count)]
    for folder in folders:
        folder.mkdir()
    return folders


def _seconds(dense: Path, tmp_path: Path) -> float:
    begin = time.monotonic()
    call = command("convert", dense, tmp_path / "timed", write_seconds=0.001)
    assert fork(call, tmp_path).end().exit_code == 0
    return time.monotonic() - begin


def _send(run: Child, number: signal.Signals) -> None:
    if run.is_running():
        os.kill(run.pid, number)


def _write(out: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    if "README.md" in files:
        save_file({"old": torch.zeros(1)}, out / "model.safetensors")


def _content(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return {str(path.relative_to(out)): path.read_text() for path in files}
