"""50 kills of real runs, at any moment: what is resumed ends as the run that nobody killed.

Each run of one process is forked from one that has imported everything (tests/forked.py), and so
begins at once. Of two processes each is started as ever.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hysparse_cli.errors import OutOfResources
from hysparse_cli.finetune.state import saved_state
from tests.finetune.conftest import Convert, documents_file  # noqa: F401
from tests.finetune.conftest import converted as converted  # a fixture
from tests.finetune.test_resume import REPOSITORY, arguments, options_for, weights
from tests.forked import Forks

pytestmark = pytest.mark.long

STEPS, KILLS, PAIR_KILLS = 16, 50, 6
CHANGES = 60  # of the disk, about half of those that a run makes


def environment() -> dict[str, str]:
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as served:
        yield served


def where(out: Path) -> str:
    """What a killed run left behind."""
    if list(out.parent.glob(f"{out.name}.partial-*")):
        return "while writing OUT"
    if list(out.with_name(f"{out.name}.state").glob("partial-*")):
        return "while saving"
    return "between saves" if saved_state(out) is not None else "before the first save"


def test_runs_killed_at_any_moment_end_as_the_one_that_nobody_killed(
    converted: Convert,
    documents_file: Path,  # noqa: F811
    tmp_path: Path,
    forks: Forks,
) -> None:
    checkpoint, draw = converted(), random.Random(12)
    options = options_for(documents_file, None, steps=STEPS)
    given = ("finetune", checkpoint, *arguments(options), "--resume", "auto")
    begun = time.monotonic()
    ended = forks.run([*given, tmp_path / "whole"])
    seconds = time.monotonic() - begun
    assert ended.exit_code == 0, ended
    killed: Counter[str] = Counter()
    outputs = 0
    while killed.total() < KILLS:
        out = tmp_path / f"out-{(outputs := outputs + 1)}"
        while not out.exists():
            begun = time.monotonic()
            if draw.random() < 0.5:
                ended = forks.run([*given, out], kill_at_change=draw.randint(1, CHANGES))
            else:
                ended = forks.run([*given, out], patience=draw.uniform(0, seconds))
            if ended.exit_code == 0:
                # it was resumed, and other work may slow a run
                seconds = 1.5 * (time.monotonic() - begun)
                break
            assert ended.exit_code == -signal.SIGKILL, ended
            killed[where(out)] += 1
        ended = forks.run([*given, out])
        assert ended.exit_code == 0, ended
        assert weights(out) == weights(tmp_path / "whole")
        assert [path.name for path in tmp_path.glob(f"{out.name}*")] == [out.name]
    sys.stderr.write(f"\n{killed.total()} kills in {outputs} runs: {dict(killed)}\n")


def test_two_processes_killed_at_any_moment_end_as_those_that_nobody_killed(
    converted: Convert,
    tiny_original: Path,
    documents_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    checkpoint, draw = converted(), random.Random(5)
    options = options_for(documents_file, tiny_original, steps=STEPS)
    given = ("finetune", checkpoint, *arguments(options), "--nproc-per-node=2", "--resume=auto")
    code, seconds = pair(given, tmp_path / "whole")
    assert code == 0
    killed: Counter[str] = Counter()
    outputs = 0
    while killed.total() < PAIR_KILLS:
        out = tmp_path / f"out-{(outputs := outputs + 1)}"
        while not out.exists():
            victim = draw.choice([0, 1, None])
            code, took = pair(given, out, draw.uniform(seconds / 3, seconds), victim)
            if code == 0:
                seconds = took
                break
            assert code in (OutOfResources.exit_code, -signal.SIGKILL)
            killed[where(out)] += 1
        code, _ = pair(given, out)
        assert code == 0
        assert weights(out) == weights(tmp_path / "whole")
        assert [path.name for path in tmp_path.glob(f"{out.name}*")] == [out.name]
    sys.stderr.write(f"\n{killed.total()} kills of pairs in {outputs} runs: {dict(killed)}\n")


def pair(
    words: tuple[object, ...], out: Path, seconds: float | None = None, victim: int | None = None
) -> tuple[int, float]:
    """Exit code and seconds; killed is one of the two processes, or all with their launcher."""
    begun = time.monotonic()
    run = subprocess.Popen(
        [sys.executable, "-m", "hysparse_cli", *map(str, words), str(out)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if seconds is not None:
        time.sleep(seconds)
        parent = psutil.Process(run.pid)
        children = sorted(parent.children(), key=lambda child: child.pid)
        for process in [parent, *children] if victim is None else children[victim : victim + 1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    return run.wait(), time.monotonic() - begun
