"""Two processes on gloo train as one does, and any number goes on where others were killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.finetune import finetune
from hysparse_cli.finetune.data import own_batches, rows_of_step
from hysparse_cli.finetune.result import FinetuneResult
from hysparse_cli.processes import claimed_exit_code, fails_first
from hysparse_cli.recipe import FinetuneOptions
from tests.conftest import Hysparse
from tests.finetune.conftest import Convert
from tests.finetune.test_resume import arguments

REPOSITORY = Path(__file__).resolve().parents[2]
LOST_IN_STEP_5 = """
import os, signal
from hysparse_cli.finetune import trainer
from hysparse_cli.cli import main
clip, steps = trainer.nn.utils.clip_grad_norm_, []
def kill(*args):
    steps.append(args)
    if len(steps) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(*args)
trainer.nn.utils.clip_grad_norm_ = kill
main()
"""


def begin(*command: object) -> subprocess.Popen[str]:
    paths = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(*command: object) -> subprocess.CompletedProcess[str]:
    run = begin(*command)
    printed, errors = run.communicate()
    return subprocess.CompletedProcess(run.args, run.returncode, printed, errors)


def said(errors: str) -> list[str]:
    """What the tool said, but for the disk that its state takes and its progress."""
    lines = [line for line in errors.splitlines() if line.startswith("hysparse: ")]
    return [line for line in lines if not line.startswith("hysparse: state is saved every ")]


def losses(steps: list[dict[str, Any]]) -> list[float]:
    names = (
        "loss",
        "next_token_loss",
        "distill_loss",
        "align_loss",
        "hidden_loss",
        "gradient_norm",
    )
    return [step[name] for step in steps for name in names if name in step]


def assert_same_run(result: dict[str, Any], out: Path, whole: FinetuneResult) -> None:
    assert len(result["steps"]) == 9
    expected = losses(whole.as_json()["steps"])
    assert losses(result["steps"]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole.out / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_train_as_one_and_go_on_after_a_kill(
    converted: Convert, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    checkpoint, out = converted(), tmp_path / "out"
    options = FinetuneOptions(
        data=str(documents_file),
        teacher=str(tiny_original),
        stages=[
            {"objective": "align", "steps": 3},
            {"objective": "distill", "steps": 3, "distill_weight": 0.5},
            {"objective": "train", "steps": 3, "trainable": "attention"},
        ],
        batch_size=2,
        gradient_accumulation=2,
        sequence_tokens=24,
        shuffle_rows=8,
        learning_rate=1e-3,
        save_every_steps=2,
        gradient_checkpointing=True,
    )
    whole = finetune(str(checkpoint), tmp_path / "whole", options, lambda now: None)

    driver = tmp_path / "driver.py"
    driver.write_text(LOST_IN_STEP_5)
    command = ("finetune", checkpoint, out, *arguments(options))
    run = start("torch.distributed.run", "--standalone", "--nproc-per-node=2", driver, *command)
    assert run.returncode != 0
    assert len(said(run.stderr)) <= 1 and "bug" not in run.stderr
    states = tmp_path / "out.state"
    assert [path.name for path in states.glob("step-*")] == ["step-000000004"]
    kept = shutil.copytree(states, tmp_path / "kept")

    run = start("hysparse_cli", *command, "--nproc-per-node=2", "--resume=auto", "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)  # of the first process alone
    assert (result["resumed_at"], result["num_processes"]) == (4, 2)
    assert result["steps"][-1]["peak_memory_bytes"] > 1e8
    assert_same_run(result, out, whole)
    assert not states.exists()

    alone = options.model_copy(update={"resume": str(kept)})
    again = finetune(str(checkpoint), tmp_path / "alone", alone, lambda now: None)
    assert again.resumed_at == 4
    assert_same_run(again.as_json(), again.out, whole)
    assert [path.name for path in kept.iterdir()] == ["step-000000004"]


def test_two_processes_train_the_same_adapters_as_one(
    converted: Convert, documents_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    options = FinetuneOptions(
        data=str(documents_file),
        steps=9,
        batch_size=2,
        sequence_tokens=24,
        shuffle_rows=8,
        learning_rate=1e-2,
        trainable="attention",
        lora_rank=4,
    )
    checkpoint, out = converted(), tmp_path / "out"
    whole = finetune(str(checkpoint), tmp_path / "whole", options, lambda now: None)
    command = ("-m", "hysparse_cli", "finetune", checkpoint, out, *arguments(options), "--json")
    run = start("torch.distributed.run", "--standalone", "--nproc-per-node=2", *command)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert (result["num_processes"], result["num_trained"]) == (2, whole.num_trained)
    assert_same_run(result, out, whole)


def test_processes_share_the_rows_of_a_step() -> None:
    step = [{"input_ids": torch.tensor([number])} for number in range(12)]

    def shares(rank: int, num_processes: int, batch_size: int) -> list[list[int]]:
        batches = own_batches(step, rank, num_processes, batch_size)
        return [batch["input_ids"].flatten().tolist() for batch in batches]

    assert shares(0, 1, 6) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert shares(1, 3, 2) == [[1, 4], [7, 10]]
    assert shares(1, 2, 4) == [[1, 3, 5], [7, 9, 11]]  # of equal size, so that none waits alone
    options = FinetuneOptions(batch_size=3, gradient_accumulation=4)
    assert rows_of_step(options, 6) == 12
    with pytest.raises(InvalidRecipe, match=r"12 rows .*batch_size 3 x .*4.*, which 5 processes"):
        rows_of_step(options, 5)


def test_only_the_first_process_to_fail_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fails_first(3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert claimed_exit_code(tmp_path) is None
    answers = []
    for rank in ("1", "0"):
        folder = tmp_path / "attempt_0" / rank
        folder.mkdir(parents=True)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        answers.append(fails_first(5 + int(rank)))
    assert answers == [True, False]
    assert claimed_exit_code(tmp_path) == 6
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert fails_first(1)
    monkeypatch.setenv("RANK", "1")
    assert not fails_first(1)


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.long), (signal.SIGTERM, 143)],
)
def test_an_interrupt_of_all_processes_is_one_line(
    hysparse: Hysparse,
    tiny_original: Path,
    documents_file: Path,
    tmp_path: Path,
    number: int,
    code: int,
) -> None:
    out = tmp_path / "out"
    flags = ("--data", documents_file, "--nproc-per-node=2", "--batch-size=3")
    refused = hysparse("finetune", tiny_original, out, *flags)
    assert refused.exit_code == 3 and "a step reads 3 rows" in refused.stderr

    flags = ("--data", documents_file, "--nproc-per-node=2", "--steps=10000", "--batch-size=2")
    more = ("--sequence-tokens=16", "--save-every-steps=1")
    run = begin("hysparse_cli", "finetune", tiny_original, out, *flags, *more)
    while not list(tmp_path.glob("out.state/step-*")):
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(number)
    printed, errors = run.communicate()
    lines = said(errors)
    assert (run.returncode, printed) == (code, "")
    assert len(lines) == 1
    assert lines[0].startswith("hysparse: interrupted; the state of step ")
    assert "out.state: --resume auto" in lines[0]
    assert not out.exists()
