"""Data sets and parquet files, beside the jsonl and text files of test_data.py."""

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.finetune.data import PackedRows
from hysparse_cli.model.loading import load_tokenizer
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.texts.corpus import corpus_of
from tests.conftest import Hysparse

pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

TEXTS = [f"w{n % 61} " * (1 + n % 7) for n in range(60)]
Write = Callable[[Path, list[str]], None]


def write_jsonl(path: Path, texts: list[str]) -> None:
    lines = [json.dumps({"n": n, "text": text}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines))


def write_parquet(path: Path, texts: list[str]) -> None:
    from pyarrow.parquet import write_table

    table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
    write_table(table, path, row_group_size=7)


@pytest.fixture(params=[("jsonl", write_jsonl), ("parquet", write_parquet)], ids=lambda p: p[0])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three files of 20 documents each."""
    name, write = request.param
    place = tmp_path / name
    place.mkdir()
    for part in range(3):
        write(place / f"part-{part}.{name}", TEXTS[20 * part : 20 * part + 20])
    return place


def options_for(data: object, **options: Any) -> FinetuneOptions:
    return FinetuneOptions(data=str(data), sequence_tokens=16, shuffle_rows=3, **options)


def test_a_data_set_is_read_in_order_and_goes_on_at_any_document(folder: Path) -> None:
    options = options_for(f"hub:{folder}")
    every = list(corpus_of(options).pieces(None))
    assert [piece.text for _, piece in every] == TEXTS
    corpus = corpus_of(options)
    for number in (1, 6, 7, 19, 20, 33, 59):
        begin = json.loads(json.dumps(every[number][0]))
        assert [piece.text for _, piece in corpus.pieces(begin)] == TEXTS[number:]
    assert [piece.text for _, piece in corpus.pieces(None)] == TEXTS


def test_rows_of_a_data_set_go_on_to_the_token(
    folder: Path, tiny_original: Path, tmp_path: Path
) -> None:
    tokenizer, options = load_tokenizer(tiny_original), options_for(f"hub:{folder}")
    whole = list(islice(PackedRows(options, tokenizer), 50))  # there are 18 rows: more than twice
    for cut in (0, 5, 16, 31):
        first = PackedRows(options, tokenizer)
        list(islice(first, cut))
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = PackedRows(options, tokenizer)
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for ours, theirs in zip(islice(second, 50 - cut), whole[cut:], strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_on_a_data_set_is_that_on_its_documents_in_one_file(
    hysparse: Hysparse, tiny_original: Path, folder: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "all.jsonl", TEXTS)
    losses = []
    for number, data in enumerate((tmp_path / "all.jsonl", f"hub:{folder}")):
        flags = ("--data", data, "--steps", 3, "--batch-size", 2, "--sequence-tokens", 16, "--json")
        run = hysparse("finetune", tiny_original, tmp_path / f"out-{number}", *flags)
        assert run.exit_code == 0, run.stderr
        losses.append([step["loss"] for step in json.loads(run.stdout)["steps"]])
    assert losses[0] == losses[1]


def test_a_parquet_file_holds_a_document_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["one", "", "two"])
    assert [piece.text for _, piece in corpus_of(options_for(path)).pieces(None)] == ["one", "two"]
    assert [piece.text for _, piece in corpus_of(options_for(path)).pieces(1)] == ["two"]


def test_subsets_and_splits_are_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ["a"])
    write_jsonl(tmp_path / "test.jsonl", ["b"])
    test = corpus_of(options_for(f"hub:{tmp_path}", data_split="test"))
    assert [piece.text for _, piece in test.pieces(None)] == ["b"]
    with pytest.raises(UnreadableInput, match=r"hub:.* can't be read: .*nosplit"):
        corpus_of(options_for(f"hub:{tmp_path}", data_split="nosplit"))
    with pytest.raises(InvalidRecipe, match=r"data_subset belongs to a data set"):
        corpus_of(options_for(tmp_path / "test.jsonl", data_subset="x"))


def test_what_is_wrong_with_the_data_is_one_line(tmp_path: Path) -> None:
    def first(data: object, **options: Any) -> Any:
        return next(iter(corpus_of(options_for(data, **options)).pieces(None)))

    write_parquet(tmp_path / "a.parquet", ["one"])
    (tmp_path / "b.parquet").write_text("not parquet")
    with pytest.raises(UnreadableInput, match=r"a\.parquet, row 1 has no field 'body'.*'text'"):
        first(tmp_path / "a.parquet", text_field="body")
    with pytest.raises(UnreadableInput, match=r"row 1: field 'n' holds a number \(0\), not text"):
        first(tmp_path / "a.parquet", text_field="n")
    with pytest.raises(UnreadableInput, match=r"b\.parquet is not a parquet file"):
        first(tmp_path / "b.parquet")
    with pytest.raises(UnreadableInput, match=r"is a folder: .*hub:"):
        first(tmp_path)
    with pytest.raises(UnreadableInput, match=r"hub:.*/none can't be read: \S"):
        first(f"hub:{tmp_path}/none")
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(
        UnreadableInput, match=r"data hub:\S+, row 1 has no field 'body' \(it has: 'n'"
    ):
        first(f"hub:{tmp_path}", text_field="body")


@pytest.mark.parametrize(
    ("module", "data", "extra"),
    [("datasets", "hub:x", "data"), ("pyarrow", "a.parquet", "data"), ("peft", "a.txt", "lora")],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    hysparse: Hysparse,
    tiny_original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    data: str,
    extra: str,
) -> None:
    (tmp_path / "a.txt").write_text("w1 w2 w3 w4")
    write_parquet(tmp_path / "a.parquet", ["w1 w2 w3 w4"])
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    flags = ("--set", "finetune.lora_rank=2", "--sequence-tokens", 2)
    run = hysparse("finetune", tiny_original, tmp_path / "out", "--data", data, *flags)
    assert run.exit_code == 3
    assert f"the package {module}: pip install 'hysparse[{extra}]'" in run.stderr
    assert run.stderr.count("\n") == 1
