"""--output: a stopped evaluation goes on, and nothing stale is taken for finished."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Hysparse

REPOSITORY = Path(__file__).parents[2]
SIZES = ("--retrieval-tokens", "400,512", "--retrieval-samples", "12", "--device", "cpu")


def _lines(output: Path) -> list[bytes]:
    path = output / "finished.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _what(output: Path) -> list[str]:
    return [json.loads(line)["key"]["what"] for line in _lines(output)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_evaluation_goes_on(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, how: signal.Signals
) -> None:
    args = ["eval", str(tiny_original), *SIZES, "--json"]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-m", "hysparse_cli", *args, "--output", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    patience = time.monotonic() + 100
    while len(_lines(tmp_path / "out")) < 3 and time.monotonic() < patience:
        time.sleep(0.01)
    process.send_signal(how)
    stdout, stderr = process.communicate()
    assert stdout == "" and not (tmp_path / "out" / "eval.json").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from there" in stderr and stderr.count("hysparse:") == 1
    kept = [line for line in _lines(tmp_path / "out") if line.endswith(b"\n")]
    assert 3 <= len(kept) < 1 + 4 * 2
    run = hysparse(*args, "--output", tmp_path / "out")
    assert run.exit_code == 0, run.stderr
    assert _lines(tmp_path / "out")[: len(kept)] == kept
    assert len(_lines(tmp_path / "out")) == 1 + 4 * 2
    whole = json.loads(hysparse(*args).stdout)
    assert json.loads(run.stdout)["checkpoints"] == whole["checkpoints"]
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == json.loads(run.stdout)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i % 61}" for i in range(400)))
    return path


def test_only_what_is_new_is_measured(
    hysparse: Hysparse, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def run(*more: object) -> str:
        sizes = ("--sequence-tokens", 64, "--retrieval-samples", 1, "--output", out)
        done = hysparse("eval", tiny_checkpoint, "--data", text, *sizes, *more)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    first = run()
    assert _what(out) == ["about", "loss"]
    assert run() == first and len(_lines(out)) == 2
    assert "loss<9" in run("--require", "loss<9", "--batch-size", 3) and len(_lines(out)) == 2
    run("--retrieval-tokens", 400, "--set", "eval.retrieval_forms=[recall]")
    assert _what(out)[2:] == ["retrieval"]
    run("--stride", 32)
    assert _what(out)[3:] == ["about", "loss"]
    text.write_text(text.read_text() + " w9")
    run()
    assert _what(out)[5:] == ["about", "loss"]
    (tiny_checkpoint / "config.json").touch()
    assert run() != first  # the text is longer now
    assert _what(out)[7:] == ["about", "loss"]


def test_a_line_cut_short_is_measured_again(
    hysparse: Hysparse, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ("eval", tiny_checkpoint, "--data", text, "--sequence-tokens", 64, "--output", out)
    whole = hysparse(*args).stdout
    about, loss = _lines(out)
    (out / "finished.jsonl").write_bytes(about + loss[: len(loss) // 2])
    assert hysparse(*args).stdout == whole
    assert _lines(out) == [about, loss]


def test_what_is_not_ours_is_refused(
    hysparse: Hysparse, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ("eval", tiny_checkpoint, "--data", text, "--sequence-tokens", 64, "--output", out)
    out.mkdir()
    (out / "finished.jsonl").write_text('{"key": 1}\n')
    run = hysparse(*args)
    assert run.exit_code == 7 and run.stderr.count("\n") == 1
    assert "finished.jsonl, line 1 is not what hysparse eval wrote" in run.stderr
    (out / "finished.jsonl").unlink()
    out.rmdir()
    out.write_text("a file")
    run = hysparse(*args)
    assert run.exit_code == 3 and "is a file: give a folder" in run.stderr
    assert run.stderr.count("\n") == 1


def test_tokenizers_are_compared_even_when_all_is_kept(
    hysparse: Hysparse, tiny_checkpoint: Path, stories_260k: Path, text: Path, tmp_path: Path
) -> None:
    args = ("--data", text, "--sequence-tokens", 64, "--output", tmp_path / "out")
    for checkpoint in (tiny_checkpoint, stories_260k):
        assert hysparse("eval", checkpoint, *args).exit_code == 0
    run = hysparse("eval", tiny_checkpoint, stories_260k, *args)
    assert run.exit_code == 3 and "different tokenizers" in run.stderr
