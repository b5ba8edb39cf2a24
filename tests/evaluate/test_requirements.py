"""--require: what is understood, what is refused before any work, and what fails."""

import json
import math
from pathlib import Path

import pytest

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.evaluate.requirements import Requirement, judge, parse_requirements
from tests.conftest import Hysparse

NAMES = ["base", "healed-0.5", "healed"]
METRICS = ["loss", "perplexity", "retrieval", "retrieval@8k", "recall@600"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("loss<=4.1", ("loss", "<=", None, 4.1)),
        ("loss<=dense+0.01", ("loss", "<=", "dense", 0.01)),
        (" retrieval >= base - 2e-2 ", ("retrieval", ">=", "base", -0.02)),
        ("retrieval@8192>.9", ("retrieval@8k", ">", None, 0.9)),
        ("retrieval@8k>=dense", ("retrieval@8k", ">=", "dense", 0)),
        ("recall@600<healed-0.5", ("recall@600", "<", "healed-0.5", 0)),
        ("recall@600<healed-0.5-0.25", ("recall@600", "<", "healed-0.5", -0.25)),
        ("recall@600<healed-0.25", ("recall@600", "<", "healed", -0.25)),
        ("perplexity<-1", ("perplexity", "<", None, -1)),
    ],
)
def test_a_requirement_is_understood(text: str, parts: tuple[str, str, str | None, float]) -> None:
    assert parse_requirements([text], NAMES, METRICS) == [Requirement(text, *parts)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "loss",
        "loss<=",
        "<=4",
        "loss==4",
        "loss=<4",
        "loss<=nobody+0.1",
        "loss<=dense*1.01",
        "loss<=dense 0.1",
        "loss<=dense++1",
        "loss<=nan",
        "3<=loss<=4",
        "accuracy>=0.5",
        "retrieval@4k>=0.5",
        "retrieval>=90%",
    ],
)
def test_what_is_no_requirement_is_refused(text: str) -> None:
    with pytest.raises(InvalidRecipe, match="require ") as refusal:
        parse_requirements(["loss<=4", text], NAMES, METRICS)
    assert repr(text) in str(refusal.value) and "'loss<=4':" not in str(refusal.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InvalidRecipe) as refusal:
        parse_requirements(["loss<=x", "speed>=1"], NAMES, METRICS)
    assert "'loss<=x'" in str(refusal.value) and "speed is not measured" in str(refusal.value)


def test_a_gate_is_for_all_but_its_reference_or_the_first() -> None:
    found = [{"loss": 4.0}, {"loss": 4.2}, {"loss": math.nan}]
    places = {"base": 0, "healed-0.5": 1, "healed": 2, "dense": 0}
    texts = ["loss<=4.1", "loss<=healed-0.5", "loss<=dense+0.25"]
    verdicts = judge(parse_requirements(texts, NAMES, METRICS), found, places)
    assert [(v.place, v.bound, v.holds) for v in verdicts] == [
        (1, 4.1, False),
        (2, 4.1, False),  # not a number is not good enough
        (0, 4.2, True),
        (2, 4.2, False),
        (1, 4.25, True),
        (2, 4.25, False),
    ]


def test_the_only_checkpoint_is_judged_by_itself() -> None:
    (verdict,) = judge(
        parse_requirements(["loss<=4.1"], ["one"], METRICS), [{"loss": 4.0}], {"one": 0}
    )
    assert verdict.holds and verdict.place == 0
    with pytest.raises(InvalidRecipe, match="no other checkpoint to compare one with"):
        parse_requirements(["loss<=dense"], ["one"], METRICS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i % 61}" for i in range(200)))
    return path


def test_a_gate_that_fails_is_exit_code_6_after_the_result(
    hysparse: Hysparse, tiny_original: Path, tiny_converted: Path, text: Path
) -> None:
    args = ("eval", tiny_original, tiny_converted, "--data", text, "--sequence-tokens", 64)
    required = ("--require", "loss<=dense-9", "--require", "loss<=dense+9", "--require", "loss<1")
    run = hysparse(*args, *required, "--json")
    assert run.exit_code == 6
    result = json.loads(run.stdout)
    assert [gate["holds"] for gate in result["gates"]] == [False, True, False]
    assert {gate["checkpoint"] for gate in result["gates"]} == {str(tiny_converted)}
    loss = result["checkpoints"][1]["loss"]["nats_per_token"]
    assert result["gates"][0]["value"] == loss
    line = f"required loss<=dense-9: converted has {loss:.6g}, the bound is"
    assert line in run.stderr and "; loss<1: converted has" in run.stderr
    assert run.stderr.count("required") == 1 and "dense+9" not in run.stderr
    run = hysparse(*args, "--require", "loss<=dense+9")
    assert run.exit_code == 0 and "holds" in run.stdout and "required" not in run.stderr


def test_a_gate_that_can_not_be_read_is_refused_before_any_work(
    hysparse: Hysparse, tiny_original: Path
) -> None:
    run = hysparse("eval", "absent", "--retrieval-tokens", 512, "--require", "loss<=1")
    assert run.exit_code == 3
    assert "loss is not measured; measured: retrieval, retrieval@512, magic-number" in run.stderr


def test_dense_needs_a_dense_checkpoint(
    hysparse: Hysparse, tiny_converted: Path, text: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(tiny_converted)
    args = ("--data", text, "--sequence-tokens", 64, "--require", "loss<=dense+0.1")
    run = hysparse("eval", tiny_converted, copy, *args)
    assert run.exit_code == 3
    assert "no checkpoint is dense" in run.stderr and run.stderr.count("\n") == 1


def test_a_figure_that_is_missing_fails() -> None:
    requirements = parse_requirements(["loss<=dense+1"], NAMES[:2], METRICS)
    places = {"base": 0, "dense": 0}
    assert [v.holds for v in judge(requirements, [{"loss": 4.0}, {}], places)] == [False]
    assert [v.holds for v in judge(requirements, [{}, {"loss": 4.0}], places)] == [False]
