"""Interrupted at any moment, a bench says so in one line and leaves no process behind."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.forked import command, fork

MARK = "HYSPARSE_BENCH_UNDER_TEST"


def processes_of(mark: str) -> list[psutil.Process]:
    """What a marked run started, by the environment that all of it inherits."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it may just have ended
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


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
    run = fork(command("bench", tiny_original, "--context", 24, "--repeat", 10**6), tmp_path)
    deadline = time.monotonic() + 120
    while not processes_of(str(tmp_path)):
        assert run.is_running() and time.monotonic() < deadline, run.end()
        time.sleep(0.01)
    time.sleep(seconds)
    heard = processes_of(str(tmp_path)) if number == signal.SIGINT else []  # as Ctrl-C is by all
    os.kill(run.pid, number)
    for process in heard:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    ended = run.end()
    said = ended.stderr
    assert ended.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "hysparse: interrupted; nothing half written is left"
    deadline = time.monotonic() + 10
    while left := processes_of(str(tmp_path)):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
