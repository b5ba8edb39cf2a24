"""Interrupted or killed at any moment, a bench leaves no process behind."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.forked import Child, command, fork
from tests.model.tiny import dense_config

MARK = "HYSPARSE_BENCH_UNDER_TEST"


def processes_of(mark: str) -> list[psutil.Process]:
    """What a marked run started, by the environment that all of it inherits."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it may just have ended
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for(number: int, mark: Path, run: Child) -> list[psutil.Process]:
    """The processes of a marked run, once there are so many."""
    deadline = time.monotonic() + 120
    while len(found := processes_of(str(mark))) < number:
        assert run.is_running() and time.monotonic() < deadline, run.end()
        time.sleep(0.01)
    return found


def wait_for_none(mark: Path, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while left := processes_of(str(mark)):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "seconds"),
    [(signal.SIGINT, 0.0), (signal.SIGINT, 3.0), (signal.SIGTERM, 0.5)],
    ids=["INT at once", "INT later", "TERM"],
)
def test_an_interrupt_while_processes_start_leaves_none(
    tiny_original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    seconds: float,
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    run = fork(command("bench", tiny_original, "--context", 24, "--repeat", 10**4), tmp_path)
    wait_for(1, tmp_path, run)
    time.sleep(seconds)
    heard = processes_of(str(tmp_path)) if number == signal.SIGINT else []  # as Ctrl-C is by all
    os.kill(run.pid, number)
    for process in heard:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    ended = run.end()
    assert ended.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], ended
    assert "Traceback" not in ended.stderr
    said = ended.stderr.splitlines()[-1]
    assert said == "hysparse: interrupted; nothing half written is left"
    wait_for_none(tmp_path)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(0.0, marks=pytest.mark.long), 3.0],
    ids=["at once", "while it measures"],
)
def test_processes_end_with_a_bench_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """A killed process can't end the others, and one turn at 64k tokens takes minutes."""
    monkeypatch.setenv(MARK, str(tmp_path))
    dense_config("qwen3").save_pretrained(tmp_path)
    size = ("--context", "64k", "--phases", "prefill", "--dtype", "float32")
    run = fork(command("bench", "--config", tmp_path, *size), tmp_path)
    subjects = 3
    wait_for(2 + subjects if seconds else 1, tmp_path, run)  # forkserver, tracker, and subjects
    time.sleep(seconds)
    os.kill(run.pid, signal.SIGKILL)
    assert run.end().exit_code == -signal.SIGKILL
    wait_for_none(tmp_path, 10 if seconds else 60)  # one that only imports ends after that
