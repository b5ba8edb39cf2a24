"""States on disk: saved by default, whole at any moment, refused where they are something else."""

import json
import os
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hysparse_cli.errors import InvalidRecipe, OutOfResources, UnreadableInput
from hysparse_cli.finetune import disk, finetune, state
from hysparse_cli.finetune.lock import locked
from hysparse_cli.finetune.state import remove_state, saved_state, state_folder, step_of
from hysparse_cli.recipe import FinetuneOptions, load_section, to_yaml
from tests.conftest import Hysparse
from tests.finetune.test_resume import Stopped, arguments, options_for, saved, stop_at


@pytest.mark.parametrize(
    ("steps", "given", "every"),
    [(200, None, 20), (25, None, 10), (8, None, 10), (1001, None, 101), (200, 7, 7)],
)
def test_state_is_saved_every_tenth_of_the_run(steps: int, given: Any, every: int) -> None:
    options = FinetuneOptions(steps=steps, save_every_steps=given)
    assert options.steps_between_saves == every


@pytest.mark.parametrize("text", ["off", "false", "'off'"])
def test_saving_can_be_off_in_a_recipe_and_stays_so(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"finetune: {{save_every_steps: {text}}}")
    options = load_section(FinetuneOptions, recipe)
    assert options.steps_between_saves is None
    recipe.write_text(to_yaml(options))
    assert load_section(FinetuneOptions, recipe) == options


@pytest.mark.parametrize("text", ["0", "-1", "on", "2.5", "[3]", "true"])
def test_saving_every_no_step_is_refused(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"finetune: {{save_every_steps: {text}}}")
    with pytest.raises(
        InvalidRecipe, match=r"save_every_steps: neither a number of steps.*nor off"
    ):
        load_section(FinetuneOptions, recipe)


def test_the_flag_takes_a_number_or_off(
    hysparse: Hysparse, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    few = ("--data", documents_file, "--steps", 2, "--batch-size", 1, "--sequence-tokens", 16)
    for given, line in (
        ("off", "no state is saved (save_every_steps: off): a run that is killed begins again"),
        ("1", f"state is saved every 1 step in {tmp_path / 'out-1.state'}: about "),
    ):
        out = tmp_path / f"out-{given}"
        run = hysparse("finetune", tiny_original, out, *few, "--save-every-steps", given)
        assert run.exit_code == 0, run.stderr
        assert run.stderr.startswith(f"hysparse: {line}")
    run = hysparse("finetune", tiny_original, tmp_path / "o", *few, "--save-every-steps", "never")
    assert run.exit_code == 3 and "neither a number of steps" in run.stderr


@pytest.mark.parametrize("fields", [{}, {"trainable": "attention"}, {"lora_rank": 2}])
def test_the_disk_that_state_needs_is_known_from_headers(
    tiny_original: Path, documents_file: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    if "lora_rank" in fields:
        pytest.importorskip("peft")
    options = options_for(documents_file, None, **fields, steps=3, shuffle_rows=1)
    with pytest.raises(Stopped):
        finetune(str(tiny_original), tmp_path / "out", options, stop_at(3))
    (step,) = (tmp_path / "out.state").iterdir()
    num_weights = len(torch.load(step / "run.pt", weights_only=True)["trained"])
    written = sum(path.stat().st_size for path in step.glob("*.distcp"))
    overhead = 3 * num_weights * 3000  # of a file for each tensor
    assert written - overhead <= disk.disk_need(tiny_original, options).state <= written


def test_too_little_disk_is_said_before_anything_is_loaded(
    hysparse: Hysparse,
    tiny_original: Path,
    documents_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def usage(path: Path) -> Any:
        return shutil._ntuple_diskusage(10**9, 10**9 - 200_000, 200_000)  # type: ignore[attr-defined]

    monkeypatch.setattr("hysparse_cli.finetune.disk.shutil.disk_usage", usage)
    monkeypatch.setattr("hysparse_cli.finetune.run.load", None)
    args = ("--data", documents_file, "--sequence-tokens", 16)
    run = hysparse("finetune", tiny_original, tmp_path / "out", *args)
    assert (run.exit_code, run.stderr.count("\n")) == (5, 1)
    assert "its state two times" in run.stderr and "save_every_steps: off" in run.stderr
    assert list(tmp_path.glob("out*")) == []


def as_file(folder: Path) -> None:
    folder.write_text("mine")


def as_link(folder: Path) -> None:
    folder.with_name("elsewhere").mkdir()
    folder.symlink_to(folder.with_name("elsewhere"))


def as_loop(folder: Path) -> None:
    folder.symlink_to(folder)


def as_project(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")


@pytest.mark.parametrize("make", [as_file, as_link, as_loop, as_project])
def test_what_is_no_folder_of_states_is_left_alone(
    hysparse: Hysparse,
    tiny_original: Path,
    documents_file: Path,
    tmp_path: Path,
    make: Callable[[Path], None],
) -> None:
    make(tmp_path / "out.state")
    for more in ((), ("--overwrite",), ("--resume", "auto")):
        args = ("--data", documents_file, *more)
        run = hysparse("finetune", tiny_original, tmp_path / "out", *args)
        assert (run.exit_code, run.stderr.count("\n")) == (3, 1)
        assert "out.state" in run.stderr and "give another OUT" in run.stderr
    left = [path.read_text() for path in tmp_path.glob("out.state/*")]
    assert left == (["mine"] if make is as_project else [])


def test_a_second_run_with_the_same_output_is_refused_and_a_killed_one_is_no_obstacle(
    hysparse: Hysparse, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    args = (tiny_original, out, "--data", documents_file, "--steps", 1, "--sequence-tokens", 16)
    with locked(state_folder(out), print):
        for more in ((), ("--overwrite",), ("--resume", "auto")):
            run = hysparse("finetune", *args, *more)
            assert (run.exit_code, run.stderr.count("\n")) == (3, 1)
            assert f"another run is writing this output (process {os.getpid()} on" in run.stderr
    assert not out.parent.exists()
    state_folder(out).mkdir(parents=True)
    (state_folder(out) / "lock").write_text("process 1 on a machine that is no more\n")
    assert hysparse("finetune", *args).exit_code == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def stopped(
    tiny_original: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FinetuneOptions]:
    """The place of an output whose state is saved, and the options that resume it."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "data.txt").write_text("w1 w2 w3 w4 w5\n" * 20)
    options = options_for(folder / "data.txt", None, steps=4, resume="auto")
    with pytest.raises(Stopped):
        finetune(str(tiny_original), folder / "out", options, stop_at(3))
    return folder / "out", options


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.pt"])
@pytest.mark.parametrize("kept", [0.5, None])
def test_a_state_that_is_damaged_is_unreadable_in_one_line(
    hysparse: Hysparse,
    tiny_original: Path,
    stopped: tuple[Path, FinetuneOptions],
    tmp_path: Path,
    name: str,
    kept: float | None,
) -> None:
    out, options = stopped
    folder = Path(shutil.copytree(state_folder(out), tmp_path / "states"))
    file = folder / "step-000000002" / name
    content = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(content[: int(len(content) * kept)])
    args = (*arguments(options), "--resume", folder / "step-000000002")
    run = hysparse("finetune", tiny_original, tmp_path / "out", *args)
    said = [line for line in run.stderr.splitlines() if line.startswith("hysparse: ")]
    lines = [line for line in said if "state is saved" not in line]
    assert len(lines) == 1
    if name == "run.pt" and kept is None:
        assert run.exit_code == 3 and "is no folder of a state" in lines[0]
    else:
        assert run.exit_code == 7 and "step-000000002" in lines[0]
        assert "can't be read" in lines[0] or "can't read" in lines[0]
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("content", [[1], {"format": 2}, {"format": "3"}, "text"])
def test_a_state_of_another_version_is_refused(
    tiny_original: Path, stopped: tuple[Path, FinetuneOptions], tmp_path: Path, content: Any
) -> None:
    out, options = stopped
    folder = Path(shutil.copytree(state_folder(out), tmp_path / "states"))
    torch.save(content, folder / "step-000000002" / "run.pt")
    given = options.model_copy(update={"resume": str(folder)})
    with pytest.raises(InvalidRecipe, match="written by another version: begin again"):
        finetune(str(tiny_original), tmp_path / "out", given, lambda now: None)


def test_a_pickle_in_the_place_of_a_state_is_not_run(
    tiny_original: Path, stopped: tuple[Path, FinetuneOptions], tmp_path: Path
) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    out, options = stopped
    folder = Path(shutil.copytree(state_folder(out), tmp_path / "states"))
    torch.save({"format": Trap()}, folder / "step-000000002" / "run.pt")
    given = options.model_copy(update={"resume": str(folder)})
    with pytest.raises(UnreadableInput, match="can't be read"):
        finetune(str(tiny_original), tmp_path / "out", given, lambda now: None)
    assert not (tmp_path / "ran").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become larger than ``size`` bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("of", ["__0_0.distcp", ".metadata", "run.pt"])
def test_a_disk_that_fills_up_at_any_file_of_a_state_keeps_the_one_before(
    tiny_original: Path, stopped: tuple[Path, FinetuneOptions], tmp_path: Path, of: str
) -> None:
    out, options = stopped
    given = {"resume": str(state_folder(out)), "save_every_steps": 1, "shuffle_rows": 8}
    folder = state_folder(tmp_path / "out")
    sizes = {p.name: p.stat().st_size for p in saved_or_fail(out).iterdir()}
    limit = min(size for name, size in sizes.items() if sizes[of] <= size) - 1

    def fill(now: Any) -> None:
        if now.step.number == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    with (
        largest_file(resource.RLIM_INFINITY),
        pytest.raises(OutOfResources, match=r"disk full .*of step 4 is not saved.*step 3 is kept"),
    ):
        finetune(str(tiny_original), tmp_path / "out", options.model_copy(update=given), fill)
    assert [path.name for path in folder.iterdir()] == ["step-000000003"]


def saved_or_fail(out: Path) -> Path:
    found = saved_state(out)
    assert found is not None
    return found


CHANGES_FILES = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def killed_at(change: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a process that is killed before its ``change``-th change of files; whether
    it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of 3.12: torch has threads
        child = os.fork()
    if child == 0:
        seen = []

        def see(event: str, args: object) -> None:
            if event in CHANGES_FILES:
                seen.append(event)
                if len(seen) == change:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(see)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def a_step(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    for file in ("__0_0.distcp", ".metadata", "run.pt"):
        (path / file).write_text(name)
    return path


@pytest.mark.parametrize("names", [["step-000000004"], ["step-000000004", "step-000000006"], []])
def test_killed_at_any_moment_of_its_replacement_a_state_is_whole(
    tmp_path: Path, names: list[str]
) -> None:
    kills = 0
    for change in range(1, 100):
        out = tmp_path / str(change)
        folder = state_folder(out)
        written = a_step(folder, "partial-abc")
        for name in names:
            a_step(folder, name)
        if not killed_at(change, partial(state._replace, folder, written, "step-000000006")):
            assert saved(out) == ["step-000000006"]
            break
        kills += 1
        last = saved_state(out)
        if names:
            assert last is not None and step_of(last) in (4, 6)
        for step in folder.glob("step-*"):
            assert len(list(step.iterdir())) == 3
        remove_state(out)
        assert saved(out) == []
    assert kills >= 1 + 5 * len(names)


def test_a_removed_state_is_whole_or_gone_whenever_it_is_killed(tmp_path: Path) -> None:
    for change in range(1, 100):
        out = tmp_path / str(change)
        step = a_step(state_folder(out), "step-000000004")
        if not killed_at(change, partial(remove_state, out)):
            assert change > 4
            return
        assert not step.exists() or len(list(step.iterdir())) == 3


def test_a_report_that_is_no_report_is_no_finished_run(
    hysparse: Hysparse, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = (tiny_original, out, "--data", documents_file, "--steps", 1, "--sequence-tokens", 16)
    assert hysparse("finetune", *args).exit_code == 0
    report = out / "hysparse_finetune.json"
    whole = json.loads(report.read_text())
    for broken in (
        [],
        whole | {"schema": "hysparse.finetune/3"},
        whole | {"steps": []},
        whole | {"steps": [{"loss": 1.0}]},
        whole | {"run": None},
        whole | {"run": whole["run"] | {"asked": [{}]}},
        whole | {"run": whole["run"] | {"stages": [whole["run"]["stages"][0] | {"steps": "1"}]}},
        whole | {"notes": 3},
    ):
        report.write_text(json.dumps(broken))
        run = hysparse("finetune", *args, "--resume", "auto")
        assert run.exit_code == 3 and "is not empty: give another folder" in run.stderr
