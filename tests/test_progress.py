"""Progress: a bar on a terminal, a few lines in a log, and nothing that could fail the work."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hysparse_cli import progress as module
from hysparse_cli.progress import progress, stages
from tests.conftest import Hysparse

COMMAND = [sys.executable, "-c", "from hysparse_cli.cli import main; main()"]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """All waiting is a twentieth of what it is."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(module, "LINE_SECONDS", 0.1)
    monkeypatch.setattr(module, "TICK_SECONDS", 0.01)


@pytest.mark.usefixtures("hasty")
def test_a_log_gets_some_lines_with_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("copying") as advance:
        for i in range(400):
            advance(i << 20, 400 << 20)
            time.sleep(0.002)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 12
    assert lines[-1].startswith("copying: ") and lines[-1].endswith(" left")
    assert "/400.0 MiB, " in lines[-1]


@pytest.mark.usefixtures("hasty")
def test_many_short_stages_give_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with stages() as advance:
        for i in range(400):
            advance(f"cell {i}", i, 400)
            time.sleep(0.002)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 30 and all("/400" in line for line in lines)


@pytest.mark.usefixtures("hasty")
def test_a_stage_that_tells_nothing_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    with stages() as advance:
        advance("a\x1b[31m [red]model[/]", 0, 1)
        time.sleep(0.5)
    assert capsys.readouterr().err == "a\\x1b[31m [red]model[/]\n"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with stages() as advance:
        for i in range(10):
            advance(f"stage {i}", i, 10)
            time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_whose_names_are_no_markup() -> None:
    program = """import time
from hysparse_cli import progress
progress.PATIENCE_SECONDS = 0.1
with progress.stages() as advance:
    for i in range(20):
        advance("model[/]", i, 20)
        time.sleep(0.05)"""
    ours, theirs = pty.openpty()
    run = subprocess.Popen([sys.executable, "-c", program], stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert run.wait() == 0 and b"model[/]" in shown and b"/20" in shown
    assert b"Error" not in shown


@pytest.mark.parametrize("where", ["/dev/full", "a closed pipe", "nowhere"])
def test_a_stderr_that_takes_nothing_fails_no_work(where: str) -> None:
    program = """import time
from hysparse_cli import progress
progress.PATIENCE_SECONDS, progress.TICK_SECONDS = 0, 0.001
with progress.stages() as advance:
    advance("stage", 1, 10)
    time.sleep(0.2)
print("done")"""
    words = [sys.executable, "-c", program]
    if where == "nowhere":
        words = ["sh", "-c", 'exec "$@" 2>&-', "sh", *words]
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, os.fdopen(writing, "w") as closed:
        stderr = {"/dev/full": full, "a closed pipe": closed, "nowhere": None}[where]
        run = subprocess.run(words, stdout=subprocess.PIPE, stderr=stderr, check=False)
    assert (run.returncode, run.stdout) == (0, b"done\n")


def test_a_command_finishes_where_stderr_is_full(tiny_original: Path, tmp_path: Path) -> None:
    words = [*COMMAND, "convert", str(tiny_original), str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        run = subprocess.run(words, stdout=subprocess.PIPE, stderr=full, check=False)
    assert run.returncode == 0 and (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("convert", "DENSE", "OUT", "--strategy", "kl"), "kl: patterns"),
        (("convert", "DENSE", "OUT", "--explain"), "ledger"),
        (("eval", "DENSE", "--retrieval-tokens", "400"), "tiny"),
        (("inspect-topk", "DENSE", "--top-k-tokens", "128"), "loading"),
        (("generate", "DENSE", "--prompt", "w1", "--json"), "generating"),
        (("bench", "DENSE", "--subjects", "dense", "--context", "16"), "starting"),
        (("finetune", "DENSE", "OUT", "--data", "TEXT", "--steps", "1"), "writing out"),
    ],
)
def test_commands_tell_a_log_what_they_do(
    words: tuple[str, ...],
    named: str,
    hysparse: Hysparse,
    monkeypatch: pytest.MonkeyPatch,
    tiny_original: Path,
    tmp_path: Path,
) -> None:
    told = []

    class Heard(module._Lines):
        def update(self, stage: str, done: int, total: int) -> None:
            told.append(stage)
            super().update(stage, done, total)

    monkeypatch.setattr(module, "_Lines", Heard)
    (tmp_path / "text.jsonl").write_text('{"text": "%s"}\n' % ("w1 w2 w3 " * 800))
    places = {"DENSE": tiny_original, "OUT": tmp_path / "out", "TEXT": tmp_path / "text.jsonl"}
    sizes = ("--set", "finetune.sequence_tokens=64") if words[0] == "finetune" else ()
    run = hysparse(*(places.get(word, word) for word in words), *sizes)
    assert run.exit_code == 0, run.stderr
    assert any(named in stage for stage in told)
