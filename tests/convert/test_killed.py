"""Killed, interrupted or overtaken at any moment: OUT is absent, or what it was, or whole."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
from hysparse_cli.files.leftovers import HOST, left_alone, lock, recover
from hysparse_cli.files.output import staged
from hysparse_cli.files.source import Source
from hysparse_cli.recipe import ConvertOptions
from tests.forked import Child, command, fork

Convert = Callable[..., Child]

OLD_CONFIG = '{"model_type": "llama"}'


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
    planned = plan(read_dense(Source("dense", folder)), ConvertOptions())
    conversion_table(execute(planned, folder.parent / "warm", lambda *_: None))
    return folder


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def wait_for_partial(parent: Path, run: Child) -> None:
    deadline = time.monotonic() + 120
    while not any(parent.glob(f"out.partial-*-{run.pid}/model-*")):
        assert run.is_running() and time.monotonic() < deadline, run.end()
        time.sleep(0.002)


@pytest.fixture
def convert(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Child]:
    """Starts a conversion of ``dense`` that takes its time."""

    def begin(*args: object) -> Child:
        call = command("convert", dense, *args, write_seconds=0.01)
        run = fork(call, tmp_path_factory.mktemp("run"))
        while not run.stderr.exists():
            time.sleep(0.001)
        return run

    return begin


def write_old(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text(OLD_CONFIG)
    save_file({"old": torch.zeros(1)}, out / "model.safetensors")


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_an_interrupt_leaves_nothing_and_says_so(
    convert: Convert, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    process = convert(tmp_path / "new" / "out")
    wait_for_partial(tmp_path / "new", process)
    os.kill(process.pid, number)
    ended = process.end()
    assert ended.exit_code == exit_code
    assert ended.stderr.endswith("hysparse: interrupted; nothing half written is left\n")
    assert "Traceback" not in ended.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_sigkill_leaves_out_as_it_was_or_whole(
    dense: Path, convert: Convert, tmp_path: Path, seconds: float
) -> None:
    out = tmp_path / "out"
    write_old(out)
    process = convert(out, "--overwrite")
    wait_for_partial(tmp_path, process)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.end()
    recover(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = set(open_checkpoint(out).tensors)
    assert names == {"old"} or names > set(open_checkpoint(dense).tensors)


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_what_appears_at_out_meanwhile_is_left_as_it_is(
    convert: Convert, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    process = convert(out, *flags)
    wait_for_partial(tmp_path, process)
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    ended = process.end()
    assert ended.exit_code == 3 and ended.stderr.count("\n") == 1, ended
    said = "thesis.tex" if flags else "appeared while this ran"
    assert said in ended.stderr or "model_type" in ended.stderr
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "out",
        "out/thesis.tex",
    ]


def test_what_is_put_into_a_checkpoint_meanwhile_keeps_it_from_being_replaced(
    convert: Convert, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_old(out)
    process = convert(out, "--overwrite")
    wait_for_partial(tmp_path, process)
    (out / "thesis.tex").write_text("precious")
    ended = process.end()
    assert ended.exit_code == 3 and "thesis.tex" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == OLD_CONFIG


def test_of_two_runs_the_second_is_refused(dense: Path, convert: Convert, tmp_path: Path) -> None:
    both = [convert(tmp_path / "out") for _ in range(2)]
    written, refused = sorted((run.end() for run in both), key=lambda ended: ended.exit_code)
    assert (written.exit_code, refused.exit_code) == (0, 3), (written, refused)
    assert "appeared while this ran" in refused.stderr or "is not empty" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(open_checkpoint(tmp_path / "out").tensors) > set(open_checkpoint(dense).tensors)


def test_an_interrupt_between_two_renames_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", os.rename
    write_old(out)

    def interrupted(*names: Path) -> None:
        rename(*names)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), staged(out, overwrite=True) as partial:
        (partial / "config.json").write_text(OLD_CONFIG + " ")
        monkeypatch.setattr(os, "rename", interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == OLD_CONFIG + " "


def test_the_next_run_restores_what_a_kill_between_two_renames_set_aside(
    tmp_path: Path, dead: int
) -> None:
    write_old(tmp_path / f"out.replaced-{HOST}-{dead}")
    (tmp_path / f"out.partial-{HOST}-{dead}").mkdir()
    (tmp_path / f"out.partial-{HOST}-{dead}" / "config.json").write_text("{")
    recover(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == OLD_CONFIG


def test_what_was_set_aside_is_removed_only_where_a_checkpoint_replaced_it(
    tmp_path: Path, dead: int
) -> None:
    out, aside = tmp_path / "out", tmp_path / f"out.replaced-{HOST}-{dead}"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    write_old(aside)
    recover(out)
    (said,) = left_alone(out)
    assert aside.exists() and str(aside) in said
    (out / "config.json").write_text(OLD_CONFIG)
    (aside / "notes.md").write_text("precious")
    recover(out)
    assert aside.exists() and left_alone(out)
    (aside / "notes.md").unlink()
    recover(out)
    assert not aside.exists() and not left_alone(out)


def test_who_holds_a_partial_tells_whether_it_is_removed_and_not_the_process_number(
    tmp_path: Path, dead: int
) -> None:
    """A number may be another program's by now, or one of another container."""
    reused = tmp_path / f"out.partial-{HOST}-{os.getppid()}"
    held = tmp_path / f"out.partial-{HOST}-{dead}"
    for folder in (reused, held):
        folder.mkdir()
    handle = os.open(held, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    recover(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [held.name]
    os.close(handle)
    recover(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_what_another_host_left_is_reported_and_never_removed(
    convert: Convert, tmp_path: Path, dead: int
) -> None:
    others = [tmp_path / f"out.partial-node-7.example-{dead}", tmp_path / f"out.partial-{dead}"]
    for folder in others:
        folder.mkdir()
    process = convert(tmp_path / "out")
    ended = process.end()
    assert ended.exit_code == 0
    first, second, *_ = ended.stderr.splitlines()
    assert first.startswith("hysparse: warning: ") and "some host" in first
    assert f"{others[0]} was left by a run on node-7.example, or is being written there" in second
    assert all(folder.exists() for folder in others)


def test_a_link_in_what_is_replaced_is_not_followed(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    write_old(out)
    elsewhere.mkdir()
    (elsewhere / "README.md").write_text("precious")
    (out / "README.md").symlink_to(elsewhere / "README.md")
    with staged(out, overwrite=True) as partial:
        (partial / "config.json").write_text(OLD_CONFIG)
    assert (elsewhere / "README.md").read_text() == "precious"
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_partial_is_held_while_it_is_written(tmp_path: Path) -> None:
    with staged(tmp_path / "out", overwrite=False) as partial:
        assert lock(partial) is None
        recover(tmp_path / "out")
        assert partial.exists()
        (partial / "config.json").write_text(OLD_CONFIG)
