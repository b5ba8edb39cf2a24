"""The demo's text and tokenizer, and what its model can do. ``make demo`` runs the demo itself."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Hysparse

ROOT = Path(__file__).parent.parent
EXAMPLES, RECIPE = ROOT / "examples", ROOT / "recipes" / "demo.yaml"
DENSE = EXAMPLES / "demo-model"
LARGEST_MODEL = 4_000_000  # bytes


@pytest.fixture(scope="module")
def recall_text() -> Any:
    """The module that the numbered scripts import from their own folder."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import recall_text  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(EXAMPLES))
    return recall_text


def test_the_shipped_model_is_small() -> None:
    assert sum(path.stat().st_size for path in DENSE.iterdir()) <= LARGEST_MODEL


def test_the_shipped_model_recalls_from_512_tokens(hysparse: Hysparse) -> None:
    size = ("--retrieval-tokens", 512, "--retrieval-samples", 5)
    run = hysparse("eval", DENSE, "--recipe", RECIPE, *size, "--json")
    assert run.exit_code == 0, run.stderr
    (cell,) = json.loads(run.stdout)["checkpoints"][0]["retrieval"]
    assert (cell["tokens"], cell["questions"]) == (512, 80)
    assert cell["correct"] >= 0.95 * cell["questions"]


def test_the_shipped_tokenizer_is_the_one_that_the_demo_builds(recall_text: Any) -> None:
    shipped = json.loads((DENSE / "tokenizer.json").read_text())
    assert (
        shipped["model"]
        == json.loads(recall_text.build_tokenizer().backend_tokenizer.to_str())["model"]
    )


def test_the_tokenizer_gives_any_text_back(recall_text: Any) -> None:
    tokenizer = recall_text.build_tokenizer()
    for text in ("\nlake: 1234567\noak: stone", "Hello, wörld  of\n\ntabs\t- 12 3456.", " a"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_and_digits_are_whole_tokens(recall_text: Any) -> None:
    tokenizer = recall_text.build_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("\nlake: 1234567\noak: stone").input_ids)
    assert tokens == ["Ċ", "lake:", "Ġ123", "456", "7", "Ċ", "oak:", "Ġstone"]


def test_contexts_of_eval_need_no_other_tokens_than_the_demo_text(recall_text: Any) -> None:
    from hysparse_cli.texts.facts import Task, write_context

    tokenizer = recall_text.build_tokenizer()
    context = write_context(Task("recall", 512, 16, 16), 0, tokenizer)
    lines = tokenizer.decode(context.input_ids).count("\n")
    assert len(context.input_ids) / lines == pytest.approx(recall_text.LINE_TOKENS, abs=0.5)


def test_a_document_tells_every_fact_twice(recall_text: Any) -> None:
    lines = recall_text.recall_document(480, random.Random(0)).split("\n")[1:]
    facts = lines[: len(lines) // 2]
    assert len(facts) == 60
    assert sorted(lines[len(facts) :]) == sorted(facts)


@pytest.mark.parametrize("seed", range(8))
def test_a_training_row_counts_only_what_the_context_tells(recall_text: Any, seed: int) -> None:
    tokenizer = recall_text.build_tokenizer()
    lesson = recall_text.Lesson(tokens=128, words=100, numbers=0.5)
    ids, weights = recall_text.training_row(lesson, tokenizer, 0.0, random.Random(seed))
    assert len(ids) == len(weights) == 128
    answers = [i for i, weight in enumerate(weights) if weight]
    assert answers and all(ids[i] in ids[:i] for i in answers)
