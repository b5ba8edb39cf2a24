"""What eval shows: a table that stays as it is, and JSON as docs/schema/eval.json says."""

import json
from dataclasses import replace
from io import StringIO
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hysparse_cli.evaluate.harness import TaskScore
from hysparse_cli.evaluate.perplexity import Loss
from hysparse_cli.evaluate.requirements import judge, parse_requirements
from hysparse_cli.evaluate.result import CheckpointScores, Evaluation, metric_names
from hysparse_cli.evaluate.retrieval import Retrieval
from hysparse_cli.evaluate.statistics import Sample
from hysparse_cli.evaluate.table import tables
from hysparse_cli.recipe import EvalOptions
from hysparse_cli.texts.documents import BadRows
from tests.conftest import Hysparse

SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "eval.json"


def _scores(name: str, worse: float) -> CheckpointScores:
    """Made-up scores; ``worse`` is what each token costs more, a little more in some windows."""
    windows = Sample([100 * (4 + worse * (1 + i % 2)) for i in range(8)], [100] * 8)
    parts = [
        Sample([12 * (5 - i / 8 + worse * (1 + w % 2)) for w in range(8)], [12] * 8)
        for i in range(8)
    ]
    wrong = 0 if isnan(worse) else 10 * worse
    right = [[4.0, 4.0 - wrong, 4.0, 4.0], [1.0, 1.0, 1.0 - wrong, 1.0]]
    return CheckpointScores(
        checkpoint=f"runs/{name}",
        attention="hysparse FSSF" if worse else "dense",
        dtype="bfloat16",
        loss=Loss(windows, parts, 101),
        retrieval=[
            Retrieval("recall", 8192, Sample(right[0], [4] * 4)),
            Retrieval("multi-key", 8192, Sample(right[1], [1] * 4)),
        ],
        tasks=[TaskScore("mmlu", "acc,none", 0.5 - worse, Sample([0.5 - worse] * 4, [1] * 4))],
    )


def _evaluation(*worse: float) -> Evaluation:
    scores = [_scores(f"model-{i}", amount) for i, amount in enumerate(worse)]
    names = [f"model-{i}" for i in range(len(worse))]
    options = EvalOptions(
        data="text.jsonl",
        retrieval_tokens=[8192],
        retrieval_forms=["recall", "multi-key"],
        lm_eval=["mmlu"],
        require=["loss<=4.1", "recall@8k>=0.9"],
    )
    requirements = parse_requirements(options.require, names, metric_names(options))
    found = [score.metrics() for score in scores]
    verdicts = judge(requirements, found, {})
    return Evaluation(options, {"device": "cpu"}, scores, verdicts, BadRows())


def _shown(evaluation: Evaluation, width: int) -> str:
    console = Console(width=width, file=StringIO())
    console.print(tables(evaluation))
    assert isinstance(console.file, StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


THREE_MODELS = """\
Evaluation

                         model-0           model-1           model-2
                    of     dense     hysparse FSSF     hysparse FSSF
 ────────────────────────────────────────────────────────────────────
  loss             800    4.0000            4.1500            4.0300
                                   +0.1500 ±0.0447   +0.0300 ±0.0089
  perplexity               54.60             63.43             56.26
  loss at 1-13      96    5.0000            5.1500            5.0300
                                   +0.1500 ±0.0447   +0.0300 ±0.0089
  loss at 14-26     96    4.8750            5.0250            4.9050
                                   +0.1500 ±0.0447   +0.0300 ±0.0089
  loss at 27-39     96    4.7500            4.9000            4.7800
                                   +0.1500 ±0.0447   +0.0300 ±0.0089
  loss at 40-52     96    4.6250            4.7750            4.6550
                                   +0.1500 ±0.0447   +0.0300 ±0.0089
  loss at 53-64     96    4.5000            4.6500            4.5300
                                   +0.1500 ±0.0447   +0.0300 ±0.0089
  loss at 65-76     96    4.3750            4.5250            4.4050
                                   +0.1500 ±0.0447   +0.0300 ±0.0089
  loss at 77-88     96    4.2500            4.4000            4.2800
                                   +0.1500 ±0.0447   +0.0300 ±0.0089
  loss at 89-100    96    4.1250            4.2750            4.1550
                                   +0.1500 ±0.0447   +0.0300 ±0.0089

  recall@8k         16    100.0%             93.8%             98.8%
                                        -6.2 ±19.9         -1.2 ±4.0
  multi-key@8k       4    100.0%             75.0%             95.0%
                                       -25.0 ±79.6        -5.0 ±15.9
  retrieval@8k            100.0%             84.4%             96.9%
                                       -15.6 ±41.0         -3.1 ±8.2

  mmlu acc           4    0.5000            0.4000            0.4800
                                   -0.1000 ±0.0000   -0.0200 ±0.0000

  loss<=4.1                                  fails             holds
  recall@8k>=0.9                             holds             holds

± 95% confidence of the difference to model-0"""


def test_nothing_is_cut_at_80_columns() -> None:
    evaluation = _evaluation(0.0, 0.1, 0.2, 0.3)
    for place, score in enumerate(evaluation.scores):
        assert score.loss is not None
        huge = Loss(Sample([2100.0] * 8, [100] * 8), score.loss.parts, 101)
        name = f"runs/a-rather-long-name-of-a-checkpoint-{place}"
        pattern = f"hysparse F{11 * 'SSSF'}"
        evaluation.scores[place] = replace(score, checkpoint=name, attention=pattern, loss=huge)
    shown = _shown(evaluation, 80)
    assert "…" not in shown and "1.32e+09" in shown


@pytest.mark.parametrize("width", [40, 80, 140])
def test_every_row_keeps_its_role_and_figures_at_any_width(width: int) -> None:
    evaluation = _evaluation(0, 0.1, 0.02)
    shown = _shown(evaluation, width)
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    text = " ".join(shown.split())
    for role in ("loss", "perplexity", "loss at 1-13", "recall@8k", "retrieval@8k", "mmlu acc"):
        assert role in text
    assert all(f"{require} " in text.replace(";", "") for require in evaluation.options.require)
    for score in evaluation.scores:
        assert score.loss is not None
        assert f"{score.loss.nats_per_token:.4f}" in text and f"{score.loss.perplexity:.2f}" in text
        assert all(f"{cell.accuracy:.1%}" in text for cell in score.retrieval)
    assert "+0.1500 ±0.0447" in text and "holds" in text and "fails" in text
    assert "model-1" in text and "hysparse FSSF" in text
    rows = shown.partition("Evaluation\n")[2].partition("± 95%")[0].splitlines()
    assert all(row.startswith((" ", *"lprm")) for row in rows if row), "only rows begin at the left"


def test_the_table_stays_as_it_is() -> None:
    assert _shown(_evaluation(0, 0.1, 0.02), 80) == THREE_MODELS


def test_many_models_make_several_tables_beside_the_first() -> None:
    text = _shown(_evaluation(0, 0.1, 0.02, 0.03, 0.04, 0.05), 120)
    heads = [
        line.split() for line in text.splitlines() if line.startswith("   ") and "model-" in line
    ]
    assert heads == [[f"model-{i}" for i in range(4)], ["model-0", "model-4", "model-5"]]


def test_one_model_has_no_differences() -> None:
    text = _shown(_evaluation(0), 80)
    assert "±" not in text and "+" not in text and "100.0%" in text


def validate(result: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(result, schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("worse", [(0,), (0, 0.1), (0, 0.1, float("nan"))])
def test_json_is_as_the_schema_says(worse: tuple[float, ...]) -> None:
    evaluation = _evaluation(*worse)
    result = json.loads(json.dumps(evaluation.as_json(), allow_nan=False))
    validate(result)
    first, *others = result["checkpoints"]
    assert first["loss"]["difference"] is first["tasks"][0]["difference"] is None
    for row in others:
        for cell in (row["loss"], *row["retrieval"], *row["tasks"]):
            assert cell["difference"] is not None


def test_json_and_table_of_the_command_agree(
    hysparse: Hysparse, tiny_original: Path, tiny_converted: Path, tmp_path: Path
) -> None:
    data = tmp_path / "text.txt"
    data.write_text(" ".join(f"w{i % 61}" for i in range(300)))
    sizes = ("--sequence-tokens", 64, "--retrieval-tokens", 400, "--retrieval-samples", 2)
    forms = ("--retrieval-forms", "recall,single-needle", "--require", "loss<=9")
    args = ("eval", tiny_original, tiny_converted, "--data", data, *sizes, *forms)
    result = json.loads(hysparse(*args, "--json").stdout)
    validate(result)
    table = hysparse(*args).stdout
    assert hysparse(*args).stdout == table
    for row in result["checkpoints"]:
        assert f"{row['loss']['nats_per_token']:.4f}" in table
        assert all(f"{nats:.4f}" in table for nats in row["loss"]["by_position"])
    found = result["checkpoints"][1]["loss"]["difference"]
    assert f"{found['value']:+.4f} ±{found['high'] - found['value']:.4f}" in table
    assert "recall@400" in table and "retrieval@400" in table
