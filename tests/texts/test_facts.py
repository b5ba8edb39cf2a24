"""Retrieval contexts: exact lengths, facts that are there, answers that are where they are said."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from hysparse_cli.errors import InvalidRecipe, UnsupportedModel
from hysparse_cli.texts.documents import read_documents
from hysparse_cli.texts.facts import FORMS, Task, write_context
from hysparse_cli.texts.words import WORDS

FILLERS = {
    "made up": None,
    "short documents": ["It was a fine day.\n\nSo they walked.", "The end came soon."],
    "no spaces": ["天地玄黄宇宙洪荒日月盈昃辰宿列张"],
}


def _byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return tokenizer


def _pieces_with_end() -> Any:
    """Words marked in front as SentencePiece does, and an end token after every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = [
        " ".join(WORDS),
        letters,
        letters.upper(),
        "0123456789 :.,=?-\n",
        "天地玄黄宇宙洪荒日月盈昃辰宿列张",
    ] * 3
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


TOKENIZERS = {"byte level": _byte_level, "pieces with end": _pieces_with_end}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[request.param]())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("tokens", [1201, 2048])
def test_lengths_are_exact_and_answers_repeat_what_was_planted(
    tokenizer: Any, form: str, filler: str, tokens: int
) -> None:
    task = Task(form, tokens, facts=5, questions=3)
    for index in range(2):
        context = write_context(task, index, tokenizer, FILLERS[filler])
        assert len(context.input_ids) == tokens
        assert context.input_ids[0] == tokenizer("a")["input_ids"][0]
        assert len(context.answers) == 3
        first = context.answers[0][0]
        planted = tokenizer.decode(context.input_ids[:first], skip_special_tokens=True)
        for begin, end in context.answers:
            value = tokenizer.decode(context.input_ids[begin:end]).strip(" .\n")
            assert value in WORDS or (value.isdigit() and len(value) == 7)
            assert value in planted


@pytest.mark.parametrize("form", FORMS)
def test_everything_follows_from_the_seed(tokenizer: Any, form: str) -> None:
    task = Task(form, 1024, facts=3, questions=2)
    first = write_context(task, 0, tokenizer)
    assert write_context(task, 0, tokenizer) == first
    assert write_context(task, 1, tokenizer) != first
    assert write_context(task, 0, tokenizer, seed=1) != first


def test_recall_asks_for_pairs_that_were_mentioned_long_before(tokenizer: Any) -> None:
    context = write_context(Task("recall", 1500, questions=4), 0, tokenizer)
    for begin, _ in context.answers:
        before = tokenizer.decode(context.input_ids[:begin], skip_special_tokens=True)
        lines = before.split("\n")
        key = lines[-1].strip(" :")
        keys = [line.strip().partition(":")[0] for line in lines[:-1]]
        distance = keys[::-1].index(key) + 1
        assert distance > len(set(keys) - {""}) // 2


@pytest.mark.parametrize("form", FORMS)
def test_a_length_that_does_not_hold_the_facts_is_refused(tokenizer: Any, form: str) -> None:
    with pytest.raises(InvalidRecipe, match=f"retrieval_tokens 40 is too short for the {form}"):
        write_context(Task(form, 40), 0, tokenizer)


def test_the_length_that_the_refusal_asks_for_is_enough(tokenizer: Any) -> None:
    with pytest.raises(InvalidRecipe) as refusal:
        write_context(Task("secret", 40), 0, tokenizer)
    enough = int(str(refusal.value).split("at least about ")[1].split(",")[0])
    context = write_context(Task("secret", enough), 0, tokenizer)
    assert len(context.input_ids) == enough


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no character offsets"):
        write_context(Task("secret", 512), 0, ByT5Tokenizer())


def test_contexts_stay_what_they_were(novels_25m: Path, gutenberg_dev: Path) -> None:
    """What was trained and measured on contexts of a seed stays comparable."""
    tokenizer = AutoTokenizer.from_pretrained(novels_25m)
    documents = list(read_documents(gutenberg_dev))
    digest = hashlib.sha256()
    for filler in (None, documents):
        for form in FORMS:
            for index in range(2):
                context = write_context(Task(form, 2000), index, tokenizer, filler)
                digest.update(json.dumps([context.input_ids, context.answers]).encode())
    assert digest.hexdigest() == "11f07a49dd82d38eb4a2da32717ad2c93d10c99dd61c81ded7d47faba6088513"
