"""Nothing that is wrong with a checkpoint is our bug, a bomb, or converted and then of no use."""

from pathlib import Path

import pytest

from tests.long.sweep import run_sweep

CASES_AT_LEAST = 500


@pytest.mark.long
def test_hundreds_of_malformed_checkpoints_are_refused_or_usable(tiny_original: Path) -> None:
    run = run_sweep(tiny_original, every=3)
    assert run.returncode == 0 and run.cases >= CASES_AT_LEAST, run.stdout
