"""Calibration rows: their shape, that they repeat, and that they hold what needs far context."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.texts.calibration import calibration_text

SIZE: dict[str, Any] = {"text_field": "text", "tokens": 2048, "sequence_tokens": 512, "seed": 0}


@pytest.fixture(scope="module")
def tokenizer(tiny_original: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_original)


def test_rows_are_the_same_for_a_seed_and_others_for_another(tokenizer: Any) -> None:
    rows = calibration_text(tokenizer, data=None, **SIZE).rows
    assert rows.shape == (4, 512) and rows.dtype == torch.int64
    assert torch.equal(rows, calibration_text(tokenizer, data=None, **SIZE).rows)


def test_each_row_plants_facts_and_asks_for_them(stories_260k: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_260k)
    rows = calibration_text(tokenizer, data=None, **SIZE).rows
    other = calibration_text(tokenizer, data=None, **SIZE | {"seed": 1}).rows
    assert not torch.equal(rows, other)
    texts = tokenizer.batch_decode(rows)
    asks = ("What is the special magic number for ", "what is the secret of ", "\n", "\n")
    ends = (" mentioned", "?", " = ", ": ")
    for text, ask, end in zip(texts, asks, ends, strict=True):
        key = text.rpartition(ask)[0].rpartition(ask)[2].partition(end)[0]
        assert key and text.count(key) >= 2, text


def test_answers_are_the_tokens_of_the_values_planted(stories_260k: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_260k)
    rows, answers = calibration_text(tokenizer, data=None, **SIZE)
    assert answers.shape == rows.shape and answers.any(1).all()
    for row, asked in zip(rows[:3], answers[:3], strict=True):
        first = int(asked.nonzero()[0])
        value = tokenizer.decode(row[first : first + int((~asked[first:]).nonzero()[0])])
        assert tokenizer.decode(row).count(value) >= 2, value


def test_rows_from_a_file_alternate_its_text_and_facts_in_it(
    tokenizer: Any, tmp_path: Path
) -> None:
    data = tmp_path / "words.txt"
    data.write_text("w7 w8 w9 w10 " * 40000)
    rows = calibration_text(tokenizer, data=data, **SIZE).rows
    own = torch.tensor(tokenizer("w7 w8 w9 w10")["input_ids"])
    of_file = torch.isin(rows, own).float().mean(1)
    assert (of_file[[0, 2]] > 0.99).all()  # an excerpt may begin within a word
    assert ((of_file[[1, 3]] > 0.1) & (of_file[[1, 3]] < 0.9)).all(), of_file


def test_what_can_not_be_read_or_does_not_fit_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(UnreadableInput, match="holds no text"):
        calibration_text(tokenizer, data=empty, **SIZE)
    with pytest.raises(InvalidRecipe, match="text of 16 tokens is too short"):
        calibration_text(tokenizer, data=None, **SIZE | {"sequence_tokens": 16})
