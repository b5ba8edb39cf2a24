import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.finetune.data import IGNORED, PackedRows
from hysparse_cli.model.loading import load_tokenizer
from hysparse_cli.recipe import FinetuneOptions


@pytest.fixture
def tokenizer(tiny_original: Path) -> Any:
    return load_tokenizer(tiny_original)


def rows_of(path: Path, tokenizer: Any, **options: Any) -> PackedRows:
    return PackedRows(FinetuneOptions(data=str(path), sequence_tokens=16, **options), tokenizer)


def take(rows: PackedRows, count: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(rows, count))


def encoded(path: Path, tokenizer: Any) -> list[list[int]]:
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]


def test_rows_hold_every_token_of_every_document_in_order(
    documents_file: Path, tokenizer: Any
) -> None:
    documents = encoded(documents_file, tokenizer)
    twice = documents + documents  # the file comes again after its end
    tokens = list(itertools.chain.from_iterable(twice))
    count = len(tokens) // 16
    rows = take(rows_of(documents_file, tokenizer, shuffle_rows=1), count)
    assert torch.cat([row["input_ids"] for row in rows]).tolist() == tokens[: count * 16]


def test_positions_restart_at_documents_and_rows_and_labels_are_ignored_there(
    documents_file: Path, tokenizer: Any
) -> None:
    starts = {0}
    for document in encoded(documents_file, tokenizer):
        starts.add(max(starts) + len(document))
    for number, row in enumerate(take(rows_of(documents_file, tokenizer, shuffle_rows=1), 20)):
        expected, position = [], 0
        for slot in range(16):
            position = 0 if slot == 0 or 16 * number + slot in starts else position + 1
            expected.append(position)
        assert row["position_ids"].tolist() == expected
        assert row["labels"].eq(IGNORED).tolist() == [position == 0 for position in expected]
        kept = row["labels"] != IGNORED
        assert torch.equal(row["labels"][kept], row["input_ids"][kept])


@pytest.mark.parametrize("shuffle_rows", [1, 8])
def test_rows_go_on_from_a_saved_state(
    documents_file: Path, tokenizer: Any, tmp_path: Path, shuffle_rows: int
) -> None:
    whole = take(rows_of(documents_file, tokenizer, shuffle_rows=shuffle_rows), 120)
    for cut in (0, 1, 7, 50, 81):  # the file holds about 80 rows
        first = rows_of(documents_file, tokenizer, shuffle_rows=shuffle_rows)
        take(first, cut)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = rows_of(documents_file, tokenizer, shuffle_rows=shuffle_rows)
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for row, expected in zip(take(second, 120 - cut), whole[cut:], strict=True):
            assert all(torch.equal(row[name], expected[name]) for name in expected)


def test_shuffling_changes_the_order_only(documents_file: Path, tokenizer: Any) -> None:
    ordered = take(rows_of(documents_file, tokenizer, shuffle_rows=1), 200)
    mixed = take(rows_of(documents_file, tokenizer, shuffle_rows=8), 100)
    other = take(rows_of(documents_file, tokenizer, shuffle_rows=8, seed=1), 100)
    plain = [tuple(row["input_ids"].tolist()) for row in ordered]
    shuffled = [tuple(row["input_ids"].tolist()) for row in mixed]
    assert shuffled != plain[:100]
    assert set(shuffled) <= set(plain[:108])
    assert shuffled != [tuple(row["input_ids"].tolist()) for row in other]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_data_without_text_is_refused(tmp_path: Path, tokenizer: Any, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(UnreadableInput, match=r"empty\.jsonl holds no text"):
        take(rows_of(path, tokenizer), 1)
