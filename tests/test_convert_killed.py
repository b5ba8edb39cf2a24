"""Killed or interrupted at any moment: OUT is absent, or what it was, or whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hysparse_cli.checkpoint import open_checkpoint
from hysparse_cli.staging import recover, staged

# slows writing down, so that a signal can land in the middle of it
SLOW = """
import sys, time
import hysparse_cli.convert.shards as shards
write = shards._write
def slowly(target, data):
    time.sleep(0.01)
    write(target, data)
shards._write = slowly
from hysparse_cli.cli import main
main()
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200KB")
    return folder


def start(*args: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SLOW, "convert", *map(str, args)]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ)
    )


def wait_for_partial(parent: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not any(parent.glob("out.partial-*/model-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def test_an_interrupt_leaves_nothing_and_exits_130(dense: Path, tmp_path: Path) -> None:
    process = start(dense, tmp_path / "out")
    wait_for_partial(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "hysparse: interrupted; nothing half written is left\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.5])
def test_sigkill_leaves_out_as_it_was_or_whole(dense: Path, tmp_path: Path, seconds: float) -> None:
    out = tmp_path / "out"
    with staged(out, overwrite=False) as partial:
        (partial / "config.json").write_text('{"old": true}')
        save_file({"old": torch.zeros(1)}, partial / "model.safetensors")
    process = start(dense, out, "--overwrite")
    wait_for_partial(tmp_path, process)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    recover(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = set(open_checkpoint(out).tensors)
    assert names == {"old"} or names > set(open_checkpoint(dense).tensors)


def test_the_next_run_restores_what_a_kill_between_two_renames_set_aside(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"out.replaced-{dead.pid}").mkdir()
    (tmp_path / f"out.replaced-{dead.pid}" / "config.json").write_text("old")
    (tmp_path / f"out.partial-{dead.pid}").mkdir()
    alive = tmp_path / f"out.partial-{os.getppid()}"
    alive.mkdir()
    recover(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name}
    assert (tmp_path / "out" / "config.json").read_text() == "old"
