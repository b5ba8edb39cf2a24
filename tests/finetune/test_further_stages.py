"""A finished run goes on: more steps are a further stage, exactly, however often it is cut."""

import json
from pathlib import Path
from typing import Any

import pytest

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.finetune import finetune
from hysparse_cli.finetune.result import FinetuneResult
from hysparse_cli.recipe import FinetuneOptions, load_section
from tests.conftest import Hysparse
from tests.finetune.conftest import Convert
from tests.finetune.test_resume import Stopped, arguments, options_for, saved, stop_at, weights


def run(checkpoint: Path, out: Path, options: FinetuneOptions, **changed: Any) -> FinetuneResult:
    return finetune(str(checkpoint), out, options.model_copy(update=changed), lambda now: None)


def test_more_steps_on_a_finished_run_are_a_further_stage_cut_or_not(
    tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    options = options_for(documents_file, None, steps=8, keep_state=True, save_every_steps=5)
    out, cut = tmp_path / "out", tmp_path / "cut"
    more = {"steps": 14, "resume": "auto"}
    for folder in (out, cut):
        run(tiny_original, folder, options)
        assert saved(folder) == ["step-000000008"]
    short = weights(out)

    result = run(tiny_original, out, options, **more)
    assert (result.resumed_at, len(result.steps), result.steps[-1].stage) == (8, 14, 2)
    assert weights(out) != short
    with pytest.raises(Stopped):
        finetune(str(tiny_original), cut, options.model_copy(update=more), stop_at(12))
    assert weights(cut) == short  # what is finished stays until there is more
    again = run(tiny_original, cut, options, **more)
    assert again.resumed_at == 10
    assert again.steps == result.steps
    assert weights(cut) == weights(out)

    made = load_section(FinetuneOptions, out / "hysparse_recipe.yaml")
    assert [stage.steps for stage in made.stages] == [8, 6]
    scratch = run(tiny_original, tmp_path / "scratch", made, keep_state=False)
    assert scratch.steps == result.steps
    assert weights(tmp_path / "scratch") == weights(out)


def test_a_further_stage_may_train_more_and_be_the_first_with_a_teacher(
    converted: Convert, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    checkpoint = converted()
    first = {"objective": "train", "steps": 3, "trainable": "new"}
    second = {"objective": "distill", "steps": 3, "trainable": "all"}
    options = options_for(documents_file, None, steps=None, keep_state=True)
    short = options.model_validate({**options.model_dump(), "stages": [first]})
    run(checkpoint, tmp_path / "out", short)
    both = {**options.model_dump(), "stages": [first, second], "teacher": str(tiny_original)}
    long = options.model_validate(both)
    whole = run(checkpoint, tmp_path / "whole", long)
    result = run(checkpoint, tmp_path / "out", long, resume="auto")
    assert result.resumed_at == 3
    assert result.steps == whole.steps
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_finished_run_that_is_resumed_is_finished(
    hysparse: Hysparse, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = options_for(documents_file, None, steps=3)
    given = arguments(options)
    first = hysparse("finetune", tiny_original, out, *given, "--resume", "auto", "--json")
    assert first.exit_code == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    halves = ("--set=finetune.batch_size=1", "--set=finetune.gradient_accumulation=4")
    for more in ((), ("--overwrite",), ("--steps", 3), halves):
        args = (*given, *more, "--resume", "auto", "--json")
        again = hysparse("finetune", tiny_original, out, *args)
        assert again.exit_code == 0
        (line,) = again.stderr.splitlines()
        assert line.startswith("hysparse: finished: ") and "all 3 steps" in line
        expected = json.loads(first.stdout) | {"finished_before": True}
        assert json.loads(again.stdout) == expected
    table = hysparse("finetune", tiny_original, out, *given, "--resume", "auto")
    assert (table.exit_code, "learning rate" in table.stdout) == (0, True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 9}, r"is finished, and its last state was not kept \(keep_state\)"),
        ({"steps": 2}, r"another run: steps \(was 3, is 2\); a finished run takes further"),
        ({"learning_rate": 1e-5}, r"another run: learning_rate \(was 0.003, is 1e-05\)"),
        ({"seed": 1}, r"is the result of another run, with another seed \(was 0, is 1\)"),
        ({"resume": None}, "is not empty: give another folder, or --overwrite"),
    ],
)
def test_what_a_finished_run_is_not(
    finished: tuple[Path, FinetuneOptions], tiny_original: Path, changed: Any, message: str
) -> None:
    out, options = finished
    before = weights(out)
    with pytest.raises(InvalidRecipe, match=message):
        run(tiny_original, out, options, **{"resume": "auto", **changed})
    assert weights(out) == before


@pytest.fixture(scope="module")
def finished(
    tiny_original: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FinetuneOptions]:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data.txt").write_text("w1 w2 w3 w4 w5\n" * 20)
    options = options_for(folder / "data.txt", None, steps=3)
    run(tiny_original, folder / "out", options)
    return folder / "out", options


def test_steps_and_stages_of_a_run_that_is_not_finished_may_not_change(
    converted: Convert, tiny_original: Path, documents_file: Path, tmp_path: Path
) -> None:
    checkpoint, out = converted(), tmp_path / "out"
    first = {"objective": "distill", "steps": 4, "learning_rate": 1e-3}
    second = {"objective": "train", "steps": 4}
    base = options_for(documents_file, tiny_original, steps=None).model_dump() | {"resume": "auto"}

    def options(*stages: dict[str, Any]) -> FinetuneOptions:
        return FinetuneOptions.model_validate({**base, "stages": list(stages)})

    with pytest.raises(Stopped):
        finetune(str(checkpoint), out, options(first, second), stop_at(3))
    for stages, message in (
        ((second, first), r"objective of stage 1 \(was 'distill', is 'train'\)"),
        ((first,), r"stages \(were 2, are 1\)"),
        ((first, second, second), "is at step 2 of 8: more steps or stages are for a finished run"),
        ((first, second | {"steps": 5}), r"steps of stage 2 \(was 4, is 5\)"),
        ((first | {"learning_rate": 2e-3}, second), r"learning_rate of stage 1 \(was 0.001"),
    ):
        with pytest.raises(InvalidRecipe, match=message):
            finetune(str(checkpoint), out, options(*stages), lambda now: None)
    assert saved(out) == ["step-000000002"]
