"""A run that is killed or interrupted goes on as if nothing had happened: bitwise, on the CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.finetune import finetune
from hysparse_cli.finetune.result import Progress
from hysparse_cli.recipe import FinetuneOptions
from tests.conftest import Hysparse
from tests.finetune.conftest import Convert

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = "from hysparse_cli.cli import main; main()"
KILLED_IN_STEP_5 = """
import os, signal
from hysparse_cli.finetune import trainer
clip, steps = trainer.nn.utils.clip_grad_norm_, []
def kill(*args):
    steps.append(args)
    if len(steps) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(*args)
trainer.nn.utils.clip_grad_norm_ = kill
"""
KILLED_WHILE_SAVING = """
import os, signal
from hysparse_cli.finetune import state
def replace(source, target):
    if target.name == "step-000000008":
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename(source, target)
state.os.replace = replace
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the subprocesses: sums depend on the number of threads
    yield
    torch.set_num_threads(before)


def options_for(data: Path, teacher: Path | None, **options: Any) -> FinetuneOptions:
    return FinetuneOptions(
        **{
            "data": str(data),
            "teacher": teacher and str(teacher),
            "steps": 10,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "sequence_tokens": 32,
            "shuffle_rows": 8,
            "distill_weight": 0.5,
            "learning_rate": 3e-3,
            "save_every_steps": 2,
            **options,
        }
    )


def arguments(options: FinetuneOptions) -> list[str]:
    fields = options.model_dump(mode="json", exclude_defaults=True)
    return [f"--set=finetune.{name}={json.dumps(value)}" for name, value in fields.items()]


def start(prelude: str, *args: object) -> subprocess.Popen[str]:
    paths = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + COMMAND, "finetune", *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run: subprocess.Popen[str], number: int) -> None:
    assert run.stderr is not None
    for line in run.stderr:
        if line.startswith(f"step {number}/"):
            return
    raise AssertionError(f"the run ended before step {number}: exit code {run.wait()}")


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in out.with_name(f"{out.name}.state").iterdir())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_killed_twice_and_resumed_equals_undisturbed(
    converted: Convert, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    checkpoint, options = converted(), options_for(documents_file, tiny_original)
    undisturbed = finetune(str(checkpoint), tmp_path / "whole", options, lambda now: None)

    out = tmp_path / "out"
    run = start(KILLED_IN_STEP_5, checkpoint, out, *arguments(options))
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    resumed = options.model_copy(update={"resume": "auto"})
    run = start(KILLED_WHILE_SAVING, checkpoint, out, *arguments(resumed))
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    names = [name.partition("-")[0] for name in saved(out)]
    assert names == ["lock", "partial", "step"] and "step-000000006" in saved(out)

    result = finetune(str(checkpoint), out, resumed, lambda now: None)
    assert result.resumed_at == 6
    assert result.steps == undisturbed.steps
    assert weights(out) == weights(tmp_path / "whole")
    assert not (tmp_path / "out.state").exists()


class Stopped(Exception):
    pass


def stop_at(number: int) -> Any:
    def on_step(now: Progress) -> None:
        if now.step.number == number:
            raise Stopped

    return on_step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_generators_and_masters_are_part_of_the_state(
    tiny_checkpoint: Path, tiny_original: Path, documents_file: Path, tmp_path: Path, dtype: str
) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (tiny_checkpoint / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    options = options_for(
        documents_file, tiny_original, dtype=dtype, gradient_checkpointing=True, steps=6
    )
    whole = finetune(str(tiny_checkpoint), tmp_path / "whole", options, lambda now: None)
    for stopped in (3, 5):
        out = tmp_path / f"out-{stopped}"
        with pytest.raises(Stopped):
            finetune(str(tiny_checkpoint), out, options, stop_at(stopped))
        torch.rand(7)
        resumed = options.model_copy(update={"resume": "auto"})
        result = finetune(str(tiny_checkpoint), out, resumed, lambda now: None)
        assert result.resumed_at == stopped - 1
        assert result.steps == whole.steps
        assert weights(out) == weights(tmp_path / "whole")


def test_a_run_that_fails_to_write_its_checkpoint_need_not_train_again(
    tiny_original: Path, documents_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(documents_file, None, steps=5)
    out, name = tmp_path / "out", str(tiny_original)

    def fail(*args: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("hysparse_cli.finetune.run.write_checkpoint", fail)
        with pytest.raises(Stopped):
            finetune(name, out, options, lambda now: None)
    resumed = options.model_copy(update={"resume": "auto"})
    result = finetune(name, out, resumed, lambda now: None)
    assert result.resumed_at == len(result.steps) == 5
    whole = finetune(name, tmp_path / "whole", options, lambda now: None)
    assert weights(out) == weights(tmp_path / "whole")
    assert result.steps == whole.steps


def test_a_state_is_neither_lost_nor_mixed_up(
    tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    options = options_for(documents_file, None)
    out, name = tmp_path / "out", str(tiny_original)
    resume = options.model_copy(update={"resume": "auto"})
    given = options.model_copy(update={"resume": str(tmp_path / "out.state")})
    with pytest.raises(
        InvalidRecipe, match=r"nothing to resume: .*out\.state is no folder of a state"
    ):
        finetune(name, out, given, lambda now: None)
    with pytest.raises(Stopped):
        finetune(name, out, resume, stop_at(3))  # there is none, so it begins
    with pytest.raises(
        InvalidRecipe, match=r"out\.state holds the state of a run, at step 2: --resume auto"
    ):
        finetune(name, out, options, lambda now: None)
    elsewhere = finetune(name, tmp_path / "other", given, lambda now: None)
    assert elsewhere.resumed_at == 2
    assert saved(out) == ["step-000000002"]
    other = resume.model_copy(update={"seed": 3})
    with pytest.raises(InvalidRecipe, match=r"another run: seed \(was 0, is 3\)"):
        finetune(name, out, other, lambda now: None)
    before = documents_file.read_text()
    documents_file.write_text(before.replace("w1", "w2", 1))  # of the same length
    with pytest.raises(InvalidRecipe, match=r"another run: the data's content$"):
        finetune(name, out, resume, lambda now: None)
    documents_file.write_text(before)
    state = tmp_path / "out.state" / "step-000000002"
    for damaged in ("__0_0.distcp", ".metadata", "run.pt"):
        whole = (state / damaged).read_bytes()
        (state / damaged).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UnreadableInput, match=r"step-000000002.* can't be read"):
            finetune(name, out, resume, lambda now: None)
        (state / damaged).write_bytes(whole)
    again = options.model_copy(update={"overwrite": True})
    assert finetune(name, out, again, lambda now: None).resumed_at == 0
    assert not state.parent.exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.long), (signal.SIGTERM, 143)],
)
def test_interrupted_runs_keep_their_state_and_say_so_in_one_line(
    tiny_original: Path, documents_file: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "out"
    options = options_for(documents_file, tiny_original, steps=200)
    run = start("", tiny_original, out, *arguments(options))
    wait_for_step(run, 10)
    run.send_signal(number)
    _, errors = run.communicate()
    assert run.returncode == code
    line = errors.splitlines()[-1]
    assert line.startswith("hysparse: interrupted; the state of step ") and "--resume auto" in line
    assert "Traceback" not in errors
    assert not out.exists()
    assert len(saved(out)) == 1


FULL_AFTER_THE_FIRST_SAVE = """
import resource
from hysparse_cli.finetune import trainer
save = trainer.save_state
def save_state(*args):
    save(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
trainer.save_state = save_state
"""


def test_a_full_disk_keeps_the_last_good_state(
    hysparse: Hysparse, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = options_for(documents_file, tiny_original)
    run = start(FULL_AFTER_THE_FIRST_SAVE, tiny_original, out, *arguments(options))
    _, errors = run.communicate()
    assert run.returncode == 5
    assert "disk full while writing" in errors.splitlines()[-1]
    assert "the state of step 4 is not saved, that of step 2 is kept" in errors.splitlines()[-1]
    assert saved(out) == ["step-000000002"]
    resumed = (*arguments(options), "--resume", tmp_path / "out.state", "--json")
    done = hysparse("finetune", tiny_original, out, *resumed)
    assert json.loads(done.stdout)["resumed_at"] == 2
