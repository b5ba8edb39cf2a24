"""Long text is tokenized in pieces to the tokens of the whole, in evaluation and in training."""

import json
import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hysparse_cli.finetune.data import PackedRows
from hysparse_cli.model.loading import load_tokenizer
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.texts.documents import pieces, read_documents
from hysparse_cli.texts.documents.pieces import PIECE_CHARACTERS, cut, encode


def whole(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many more cuts than a file that is quick to read would have."""
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 600)
    monkeypatch.setattr(pieces, "CONTEXT_CHARACTERS", 200)


def scrawl(seed: int) -> str:
    """A few thousand characters of words, blanks of all kinds, digits and symbols."""
    rng = random.Random(seed)
    parts = [
        "the ",
        "Lily",
        " dog",
        "ä",
        "日本",
        "😀",
        "12345",
        "!?",
        "</s>",
        "<s>",
        "'s",
        "e\u0301",
    ]
    blanks = [" ", " ", " ", "\n", "\n\n", "  ", "\t", " \n ", "\u00a0", "\u2028"]
    return "".join(rng.choice(parts) + rng.choice(blanks) for _ in range(1500))


def byte_level(trim: bool) -> Any:
    """A tokenizer such as GPT-2's, which splits words by a pattern, of few merges."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "d"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("1", "2")]
    for merge in merges:
        vocabulary["".join(merge)] = len(vocabulary)
    vocabulary |= {"<s>": len(vocabulary), "</s>": len(vocabulary) + 1}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=trim), template]
    )
    return fast(tokenizer)


def prefixed() -> Any:
    """A tokenizer such as Llama 2's, which sees no words: a blank before all, and bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["▁", *"thedogLily", "▁t", "▁th", "▁the", "▁d", "▁▁"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "d"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return fast(tokenizer)


def fast(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("kind", ["byte-level", "trimmed", "prefixed"])
def test_pieces_have_the_tokens_of_the_whole(small_pieces: None, kind: str) -> None:
    tokenizer = prefixed() if kind == "prefixed" else byte_level(kind == "trimmed")
    for seed in range(20):
        text = scrawl(seed)
        assert len(list(cut([text]))) > 8
        assert encode(tokenizer, text) == whole(tokenizer, text)


@pytest.mark.parametrize("checkpoint", ["stories_260k", "novels_25m"])
def test_pieces_have_the_tokens_of_the_whole_for_real_tokenizers(
    small_pieces: None, request: pytest.FixtureRequest, gutenberg_dev: Path, checkpoint: str
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(checkpoint))
    book = next(read_documents(gutenberg_dev))[:200_000]
    for text in (book, *map(scrawl, range(10))):
        assert encode(tokenizer, text) == whole(tokenizer, text)


@pytest.mark.parametrize("chunks", [1, 7, 5000, 10**9])
def test_pieces_join_to_the_text_and_end_with_lines_or_words(
    small_pieces: None, chunks: int
) -> None:
    lines, words = "some words of a line\n" * 300, "word " * 1000
    for text, ends in ((lines, "\n"), (words, "d"), ("x" * 5000, "x"), ("", "")):
        found = list(cut(text[i : i + chunks] for i in range(0, len(text), chunks)))
        assert "".join(piece.text for piece in found) == text
        assert all(piece.text.endswith(ends) and len(piece.text) <= 600 for piece in found[:-1])
        assert [piece.before for piece in found] == ["", *(p.text[-200:] for p in found[:-1])][
            : len(found)
        ]
        assert [piece.after for piece in found] == [
            *(text_after[:200] for text_after in rests(found[1:])),
            "",
        ][: len(found)]


def rests(found: list[pieces.Piece]) -> Iterable[str]:
    return ["".join(piece.text for piece in found[i:]) for i in range(len(found))]


def test_a_long_text_file_is_trained_on_as_one_document(
    tiny_original: Path, tmp_path: Path
) -> None:
    """Its rows have the tokens of the whole, one end, and positions that restart at rows only."""
    rng = random.Random(0)
    blanks = [" " * 16, "\n" * 16]
    text = "".join(f"w{rng.randrange(61)}{rng.choice(blanks)}" for _ in range(70_000))
    assert len(text) > PIECE_CHARACTERS + 200_000
    path = tmp_path / "long.txt"
    path.write_text(text)
    tokenizer = load_tokenizer(tiny_original)
    options = FinetuneOptions(data=str(path), sequence_tokens=512, shuffle_rows=1)
    ids = [*whole(tokenizer, text), tokenizer.eos_token_id]
    count = len(ids) // 512
    rows = list(islice(PackedRows(options, tokenizer), count))
    assert torch.cat([row["input_ids"] for row in rows]).tolist() == ids[: count * 512]
    assert all(row["position_ids"].tolist() == list(range(512)) for row in rows)
    (last,) = islice(PackedRows(options, tokenizer), count, count + 1)
    end = len(ids) - count * 512
    assert last["position_ids"].tolist() == [*range(end), *range(512 - end)]


@pytest.mark.parametrize("hub", [False, True])
def test_rows_of_documents_in_pieces_go_on_from_a_saved_state(
    small_pieces: None, tiny_original: Path, tmp_path: Path, hub: bool
) -> None:
    if hub:
        pytest.importorskip("datasets")
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(61)}" for _ in range(n)) for n in (900, 3, 700, 1, 40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer = load_tokenizer(tiny_original)
    data = f"hub:{tmp_path}" if hub else str(tmp_path / "data.jsonl")
    options = FinetuneOptions(data=data, sequence_tokens=16, shuffle_rows=3)
    expected = list(islice(PackedRows(options, tokenizer), 150))  # more than once through
    for cut_at in (0, 1, 20, 40, 60, 100, 110):
        first = PackedRows(options, tokenizer)
        list(islice(first, cut_at))
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = PackedRows(options, tokenizer)
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for row, other in zip(islice(second, 150 - cut_at), expected[cut_at:], strict=True):
            assert all(torch.equal(row[name], other[name]) for name in other)
