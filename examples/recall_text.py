"""The demo's text and its tokenizer: lines of ``word: value``, then the same lines in new orders.

It is the ``recall`` text of ``hysparse eval``; the tokenizer knows its words whole.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from hysparse_cli.texts.words import WORDS

ASKING_TOKENS = 2  # of a line: the newline, the word with its colon; then comes the value
LINE_TOKENS = 4  # on average, half of the values being numbers


class Lesson(NamedTuple):
    """Rows of ``tokens`` about the first ``words`` words; the share ``numbers`` is numbers."""

    tokens: int
    words: int
    numbers: float


def recall_facts(
    words: Sequence[str], pairs: int, rng: random.Random, numbers: float = 0.5
) -> list[str]:
    """``pairs`` lines about different words; a share ``numbers`` of the values is 7 digits."""
    return [
        f"\n{word}: {rng.randrange(10**6, 10**7) if rng.random() < numbers else rng.choice(words)}"
        for word in rng.sample(words, pairs)
    ]


def recall_document(tokens: int, rng: random.Random) -> str:
    """As many facts as fit in half of about ``tokens`` tokens, then the same in another order."""
    facts = recall_facts(WORDS, tokens // LINE_TOKENS // 2, rng)
    return "".join(facts + rng.sample(facts, len(facts)))


def training_row(
    lesson: Lesson, tokenizer: PreTrainedTokenizerFast, unknown: float, rng: random.Random
) -> tuple[list[int], list[float]]:
    """Token ids, and how much each counts: 1 in an answer, ``unknown`` where nothing tells it.

    A quarter of the rows are any words, repeated: copying is learned from these first.
    """
    words = WORDS[: lesson.words]
    if repeats := rng.random() < 0.25:
        length = rng.randint(4, lesson.tokens // 2)
        forms = [rng.choice((" {}", "{}:")) for _ in range(length)]
        text = [f.format(word) for f, word in zip(forms, rng.sample(words, length), strict=True)]
        parts = tokenizer(text).input_ids
    else:
        most = lesson.tokens // LINE_TOKENS // 2
        facts = recall_facts(words, rng.randint(2, most), rng, lesson.numbers)
        parts = tokenizer(facts).input_ids
    asking = 0 if repeats else ASKING_TOKENS
    ids: list[int] = []
    weights: list[float] = []
    answer = unknown
    while len(ids) < lesson.tokens:
        for part in parts:
            ids += part
            weights += [unknown] * asking + [answer] * (len(part) - asking)
        if not repeats:
            rng.shuffle(parts)
        answer = 1.0
    return ids[: lesson.tokens], weights[: lesson.tokens]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """``word``, `` word``, ``word:`` and three digits are one token each, all else is bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [form.format(word) for word in WORDS for form in ("{}", "Ġ{}", "{}:")]
    digits = [*(f"{n:02}" for n in range(100)), *(f"{n:03}" for n in range(1000))]
    pieces = ["<|end|>", *alphabet, *words, *digits, *(f"Ġ{n}" for n in range(100, 1000))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[], ignore_merges=True))
    split = Regex(r" ?[a-z]+:?| ?[0-9]{1,3}| ?[^\sa-z0-9]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
