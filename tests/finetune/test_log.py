"""What a run shows and logs on its way."""

import json
from pathlib import Path

import pytest

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.finetune import log as scalars
from hysparse_cli.finetune.log import check_package
from hysparse_cli.finetune.result import Progress, Step
from hysparse_cli.progress import training
from tests.conftest import Hysparse

PACKAGE = "tensorboard"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf's and tensorboard's own
def test_tensorboard_reads_every_step(
    hysparse: Hysparse, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip(PACKAGE)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--data", documents_file, "--steps=4", "--batch-size=2", "--sequence-tokens=16")
    run = hysparse("finetune", tiny_original, tmp_path / "out", *flags, "--log-to", PACKAGE)
    assert run.exit_code == 0, run.stderr
    written = EventAccumulator(str(tmp_path / "out.logs")).Reload()
    names = {"loss", "next_token_loss", "learning_rate", "tokens_per_second", "peak_memory_bytes"}
    assert names <= set(written.Tags()["scalars"])
    assert [event.step for event in written.Scalars("loss")] == [1, 2, 3, 4]
    assert all(3 < event.value < 5 for event in written.Scalars("loss"))


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_wandb_keeps_every_step_offline(
    hysparse: Hysparse,
    tiny_original: Path,
    documents_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ("--data", documents_file, "--steps=4", "--batch-size=2", "--sequence-tokens=16")
    run = hysparse("finetune", tiny_original, tmp_path / "out", *flags, "--log-to=wandb", "--json")
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout)["steps"][3]["number"] == 4
    (file,) = tmp_path.glob("out.logs/wandb/offline-run-*/run-*.wandb")
    written = file.read_bytes()
    assert written.count(b"peak_memory_bytes") >= 4
    assert b"next_token_loss" in written and b"sequence_tokens" in written


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "find_spec", lambda name: None)
    check_package(None)
    with pytest.raises(InvalidRecipe, match=r"wandb is not installed: .*hysparse\[logging\]"):
        check_package("wandb")


def test_a_terminal_shows_a_live_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    losses = {"next_token_loss": 3.5, "distill_loss": 1.25, "hidden_loss": 0.0}
    step = Step(
        number=30,
        stage=2,
        objective="distill",
        loss=2.5,
        losses=losses,
        learning_rate=3e-4,
        gradient_norm=0.7,
        tokens=1000,
        seconds=2.0,
        peak_memory_bytes=12_340_000_000,
    )
    with training() as told:
        told.on_step(Progress(step, 3, 100, 45_678.9, 3725.0))
    shown = capsys.readouterr().err
    for cell in (
        "2/3 distill",
        "30/100",
        "KL to teacher",
        "1.2500",
        "hidden state error",
        "0.0000",
        "45,679",
        "11.5 GiB",
        "1:02:05",
    ):
        assert cell in shown
    assert "attention error" not in shown
