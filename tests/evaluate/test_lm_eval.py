"""--lm-eval: a small task of our own through the real lm_eval, where it is installed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hysparse_cli.evaluate.harness import scores_of
from hysparse_cli.evaluate.statistics import Sample
from hysparse_cli.model.loading import load
from tests.conftest import Hysparse
from tests.evaluate.test_table import validate

lm_eval_warns = pytest.mark.filterwarnings("default")

QUESTIONS = ["w1 w2", "w9 w8 w7", "w30", "w5 w5", "w17 w4", "w60 w2"]
CHOICES = [" w3", " w11"]

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """
group: tiny_group
task: [tiny_choice]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks for --set eval.lm_eval_folder."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    items = tmp_path / "items.jsonl"
    rows = [
        {"question": question, "choices": CHOICES, "answer": i % 2}
        for i, question in enumerate(QUESTIONS)
    ]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(TASK.format(items=items))
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (hysparse[lm-eval])")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def _expected(checkpoint: Path) -> list[float]:
    """Which questions the model answers rightly: the likelier choice is the right one."""
    loaded = load(str(checkpoint))
    right = []
    for i, question in enumerate(QUESTIONS):
        ids = torch.tensor([loaded.tokenizer(question)["input_ids"]])
        with torch.no_grad():
            scores = loaded.model(ids).logits[0, -1].log_softmax(-1)
        (first,), (second,) = (loaded.tokenizer(choice)["input_ids"] for choice in CHOICES)
        right.append(float((scores[second] > scores[first]) == bool(i % 2)))
    return right


@lm_eval_warns
def test_a_task_runs_on_dense_and_converted_checkpoints(
    hysparse: Hysparse,
    offline: None,
    tiny_original: Path,
    tiny_converted: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    args = ("--lm-eval", "tiny_choice,tiny_group", "--set", f"eval.lm_eval_folder={folder}")
    gate = ("--require", "tiny_choice>=dense-1", "--output", tmp_path / "out")
    command = ("eval", tiny_original, tiny_converted, *args, *gate, "--json")
    run = hysparse(*command)
    assert run.exit_code == 0, run.stderr
    result = json.loads(run.stdout)
    for row, checkpoint in zip(result["checkpoints"], (tiny_original, tiny_converted), strict=True):
        right = _expected(checkpoint)
        assert [(task["task"], task["metric"]) for task in row["tasks"]] == [
            ("tiny_choice", "acc,none"),
            ("tiny_group", "acc,none"),
        ]
        assert all(task["value"] == pytest.approx(sum(right) / 6) for task in row["tasks"])
    for task in result["checkpoints"][1]["tasks"]:
        assert task["difference"]["low"] is not None
    assert result["gates"][0]["holds"]
    validate(result)
    assert hysparse(*command).stdout == run.stdout  # from --output
    assert "tiny_choice acc" in hysparse(*command[:-1]).stdout


@lm_eval_warns
def test_an_unknown_task_is_refused_before_any_work(
    hysparse: Hysparse, offline: None, tiny_original: Path, folder: Path
) -> None:
    args = ("--lm-eval", "tiny_choice,tiny_typo", "--set", f"eval.lm_eval_folder={folder}")
    run = hysparse("eval", tiny_original, *args)
    assert run.exit_code == 3
    assert "lm_eval has no task tiny_typo" in run.stderr and run.stderr.count("\n") == 1


@lm_eval_warns
def test_a_task_whose_data_is_missing_is_one_line(
    hysparse: Hysparse, offline: None, tiny_original: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "items.jsonl").unlink()
    args = ("--lm-eval", "tiny_choice", "--set", f"eval.lm_eval_folder={folder}")
    run = hysparse("eval", tiny_original, *args)
    assert run.exit_code == 7
    assert "hysparse: lm_eval can't read the data of tiny_choice" in run.stderr


def test_without_the_package_it_is_refused(
    hysparse: Hysparse, tiny_original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    run = hysparse("eval", tiny_original, "--lm-eval", "mmlu")
    assert run.exit_code == 3 and run.stdout == ""
    assert "needs the package lm_eval: pip install 'hysparse[lm-eval]'" in run.stderr
    assert run.stderr.count("\n") == 1


def _results(samples: dict[str, list[dict[str, Any]]], **rows: dict[str, Any]) -> dict[str, Any]:
    members = {"group": ["one", "two"]}
    return {"results": rows, "samples": samples, "group_subtasks": members}


def test_scores_have_samples_only_where_these_make_the_value() -> None:
    acc = [{"filter": "none", "metrics": ["acc"], "acc": x} for x in (1.0, 0.0, 1.0)]
    samples = {"one": acc[:1], "two": acc[1:]}
    one = {"alias": "one", "acc,none": 1.0, "acc_stderr,none": 0.1, "sample_len": 1}
    micro, macro = {"acc,none": 2 / 3}, {"acc,none": 0.75, "acc_stderr,none": "N/A"}
    (score,) = scores_of("one", _results(samples, one=one))
    assert (score.value, score.sample) == (1.0, Sample([1.0], [1]))
    (score,) = scores_of("group", _results(samples, one=one, group=micro))
    assert score.sample == Sample([1.0, 0.0, 1.0], [1, 1, 1])
    (score,) = scores_of("group", _results(samples, one=one, group=macro))
    assert score.task == "group" and score.value == 0.75 and score.sample is None
    members = scores_of("tag", _results(samples, one=one, two={"acc,none": 0.5}))
    assert [(score.task, score.value) for score in members] == [("one", 1.0), ("two", 0.5)]


def test_lengths_that_ruler_was_not_asked_for_are_left_out() -> None:
    rows = {"4096,none": 0.5, "8192,none": -1}
    (score,) = scores_of("niah", _results({"niah": []}, niah=rows))
    assert score.metric == "4096,none"
