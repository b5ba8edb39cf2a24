"""Convert malformed checkpoints, each in a child: python -m tests.long.sweep CHECKPOINT [EVERY].

What must hold of each: an exit code of its own and never 1, one line that says why, 10 s and 1 GB
beyond an empty start at most, nothing left behind; and what is converted loads and gives finite
logits. What does not hold is printed, then a count by kind and exit code; it exits with 1 if
anything did not hold.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.forked import NETWORK, Outcome, command, fork, no_network
from tests.long.case import Case
from tests.long.malformed import all_cases

EXPECTED = {0, 3, 4, 5, 7}
MOST_SECONDS = 10
MOST_BYTES = 1 << 30
PATIENCE = 60  # seconds, however busy the machine is
ADDRESS_BYTES = 8 << 30  # so that a bomb does not take the machine with it
ROOT = Path(__file__).parents[2]


class Run(NamedTuple):
    """A sweep that has ended: how many ``cases`` it tried, and what it printed."""

    returncode: int
    cases: int
    stdout: str


def limited(call: Callable[[], object], scratch: Path) -> Outcome:
    """What becomes of ``call`` in a child that may not have all memory, nor reach the network."""

    def run() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.addaudithook(no_network)
        call()

    return fork(run, scratch).end(PATIENCE)


def convert(model: Path, out: Path) -> None:
    warnings.simplefilter("default")
    command("convert", model, out)()


def use(folder: Path) -> None:
    """Load a converted checkpoint as its users do, and ask it for logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hysparse_cli  # noqa: F401

    warnings.simplefilter("ignore")
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits = model(torch.arange(3)[None]).logits
    assert logits.shape[:2] == (1, 3) and torch.isfinite(logits).all(), "logits are not finite"
    if list(folder.glob("tokenizer*")):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def faults(outcome: Outcome, left: list[str], empty_bytes: int) -> list[str]:
    """What does not hold of one conversion."""
    found = []
    if outcome.exit_code < 0:
        found.append(f"killed by signal {-outcome.exit_code}")
    elif outcome.exit_code == NETWORK:
        found.append("reached for the network")
    elif outcome.exit_code not in EXPECTED:
        found.append(f"exit code {outcome.exit_code}")
    if outcome.seconds > MOST_SECONDS:
        found.append(f"{outcome.seconds:.1f} s")
    if (more := outcome.peak_bytes - empty_bytes) > MOST_BYTES:
        found.append(f"{more / 1e9:.2f} GB")
    lines = outcome.stderr.splitlines()
    if outcome.exit_code and not (len(lines) == 1 and lines[0].startswith("hysparse: ")):
        found.append(f"{len(lines)} lines on stderr")
    if not all(line.startswith("hysparse: ") for line in lines):
        found.append("a line on stderr that is not ours")
    if not outcome.stderr.replace("\n", "").isprintable():
        found.append("unprintable stderr")
    if outcome.exit_code and left:
        found.append(f"left {left}")
    return found


def tried(case: Case, good: Path, empty_bytes: int) -> tuple[Outcome, list[str]]:
    """One case from a fresh copy of ``good``: what convert did, and what did not hold of it."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shutil.copytree(good, place / "model")
        (place / "made").mkdir()
        case.damage(place / "model")
        out = place / "made" / "out"
        outcome = limited(lambda: convert(place / "model", out), place)
        left = sorted(path.name for path in (place / "made").iterdir())
        found = faults(outcome, left, empty_bytes)
        if outcome.exit_code == 0:
            used = limited(lambda: use(out), place)
            if used.exit_code:
                found.append(f"converted, but can't be used: {used.stderr[-300:]!r}")
    return outcome, found


def sweep(good: Path, every: int = 1) -> int:
    """How many cases did not hold, of each ``every``-th of all."""
    _import_once()
    with tempfile.TemporaryDirectory() as name:
        empty_bytes = limited(lambda: None, Path(name)).peak_bytes
    counts: Counter[tuple[str, int]] = Counter()
    failed = 0
    slowest = largest = (0.0, "")
    cases = all_cases(good)[::every]
    for case in cases:
        outcome, found = tried(case, good, empty_bytes)
        counts[case.kind, outcome.exit_code] += 1
        slowest = max(slowest, (outcome.seconds, f"{case.kind}: {case.name}"))
        largest = max(
            largest, ((outcome.peak_bytes - empty_bytes) / 1e9, f"{case.kind}: {case.name}")
        )
        if found:
            failed += 1
            print(
                f"{case.kind}: {case.name}: {'; '.join(found)} | {outcome.stderr[:300]!r}",
                flush=True,
            )
    for (kind, code), count in sorted(counts.items()):
        print(f"{kind:20} exit {code}: {count}")
    print(f"{len(cases)} cases, {failed} do not hold")
    print(f"slowest {slowest[0]:.2f} s: {slowest[1]}; largest {largest[0]:.2f} GB: {largest[1]}")
    return failed


def run_sweep(good: Path, every: int) -> Run:
    """The same in a process of its own, which has no other threads when it forks."""
    command = [sys.executable, "-m", "tests.long.sweep", str(good), str(every)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    print(done.stdout)
    found = re.search(r"^([0-9]+) cases", done.stdout, re.M)
    return Run(done.returncode, int(found[1]) if found else 0, done.stdout + done.stderr)


def _import_once() -> None:
    """Import what a conversion imports, in this process, without running one here."""
    import hysparse_cli.cli
    import hysparse_cli.convert.decide
    import hysparse_cli.convert.table
    import hysparse_cli.convert.write  # noqa: F401
    from hysparse_cli import progress
    from hysparse_cli.model.registration import config_class

    config_class("qwen3")
    progress.PATIENCE_SECONDS = 3600  # a busy machine makes it say what it does


if __name__ == "__main__":
    sys.exit(bool(sweep(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
