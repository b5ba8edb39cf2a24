"""50 kills of real runs, at any moment: what is resumed ends as the run that nobody killed.

One process imports everything and computes nothing; each run is forked from it, and so begins at
once. Of two processes each is started as ever.
"""

import json
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

pytestmark = pytest.mark.long

FORKED = """
import json, os, signal, sys
import hysparse_cli.finetune, hysparse_cli.model.registration
import transformers.models.qwen3.modeling_qwen3
from hysparse_cli.cli import main

def kill_at(change):
    seen = []
    def see(event, args):
        wrote = event == "open" and isinstance(args[1], str) and args[1][:1] in "wax"
        if wrote or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            seen.append(event)
            if len(seen) == change:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(see)

for line in sys.stdin:
    words, change, log = json.loads(line)
    child = os.fork()
    if child == 0:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1), os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["hysparse", *words]
        if change:
            kill_at(change)
        main()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
STEPS, KILLS, PAIR_KILLS = 16, 50, 6
CHANGES = 60  # of the disk, about half of those that a run makes


def environment() -> dict[str, str]:
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


class Runs:
    """Starts runs in processes forked from one that is warm."""

    def __init__(self, log: Path):
        self.log = log
        self.warm = subprocess.Popen(
            [sys.executable, "-c", FORKED],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, *words: object, change: int = 0, seconds: float | None = None
    ) -> tuple[int, float]:
        """The exit code and the seconds of ``hysparse words``.

        Args:
            change: kill it at this change of the disk. seconds: kill it after them.
        """
        assert self.warm.stdin is not None and self.warm.stdout is not None
        command = [list(map(str, words)), change, str(self.log)]
        self.warm.stdin.write(json.dumps(command) + "\n")
        self.warm.stdin.flush()
        child, begun = int(self.warm.stdout.readline()), time.monotonic()
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(child, signal.SIGKILL)
        return int(self.warm.stdout.readline()), time.monotonic() - begun


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    made = Runs(tmp_path / "log")
    with made.warm:  # which ends where its stdin does
        yield made


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
    runs: Runs,
) -> None:
    checkpoint, draw = converted(), random.Random(12)
    options = options_for(documents_file, None, steps=STEPS)
    given = ("finetune", checkpoint, *arguments(options), "--resume", "auto")
    code, seconds = runs(*given, tmp_path / "whole")
    assert code == 0, runs.log.read_text()
    killed: Counter[str] = Counter()
    outputs = 0
    while killed.total() < KILLS:
        out = tmp_path / f"out-{(outputs := outputs + 1)}"
        while not out.exists():
            if draw.random() < 0.5:
                code, took = runs(*given, out, change=draw.randint(1, CHANGES))
            else:
                code, took = runs(*given, out, seconds=draw.uniform(0, seconds))
            if code == 0:
                seconds = 1.5 * took  # it was resumed, and other work may slow a run
                break
            assert code == -signal.SIGKILL, runs.log.read_text()
            killed[where(out)] += 1
        code, _ = runs(*given, out)
        assert code == 0, runs.log.read_text()
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
    """As ``Runs``; killed is one of the two processes, or with None all and their launcher."""
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
