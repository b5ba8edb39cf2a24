"""Writes RULER's forms of retrieval as prompts of an exact token length, for any tokenizer.

After "RULER: What's the Real Context Size of Your Long-Context Language Models?" (Hsieh et al.,
arXiv 2404.06654): its tasks, with its numbers of hops and of common words, in words of our own.
A prompt gives no example, ends with the beginning of the answer and has no chat template, so that
base models can go on with it. What a model writes there is scored as RULER does ("string match,
all"): the part of the answers that appear in it, capitals aside. Everything follows from a seed.
"""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hysparse_cli.texts.encoded import encode
from hysparse_cli.texts.facts import WORDINGS, Task, too_short
from hysparse_cli.texts.haystack import MIN_SPARE, fill
from hysparse_cli.texts.words import word_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HOPS = 4
COMMON_WORDS, COMMON_TO_RARE = 10, 10
ZETA_2 = 1.6449340668482264
SIZINGS = 5  # at most, to find how long a list fits

NEEDLE = WORDINGS["magic-number"]
SEVERAL = (
    " What are all the special magic numbers for {keys} mentioned in the provided text?"
    " The special magic numbers for {keys} mentioned in the provided text are:"
)
VARIABLES = (
    " Question: which variables are assigned the value {value} in the text above, directly or"
    " through other variables? Answer: the {count} variables that are assigned the value {value}"
    " are:"
)


@dataclass(frozen=True)
class Prompt:
    """What a model reads, the ``answers`` it should write, and in how many tokens at most."""

    input_ids: list[int]
    answers: tuple[str, ...]
    max_new_tokens: int

    def found_in(self, text: str) -> int:
        """How many of the answers appear in ``text``."""
        return sum(answer.lower() in text.lower() for answer in self.answers)


@dataclass(frozen=True)
class _Parts:
    """Pieces to plant, the end of the prompt, and the answers; ``like`` is one of their kind."""

    pieces: list[str]
    end: str
    answers: tuple[str, ...]
    like: str = "7654321"


def write_prompt(
    task: Task,
    index: int,
    tokenizer: "PreTrainedTokenizerBase",
    filler: Sequence[str] | None = None,
    seed: int = 0,
) -> Prompt:
    """The ``index``-th prompt of ``task``, whose form is one of RULER_FORMS.

    The prompt and the room for the answer together are ``task.tokens`` long. ``task.facts`` keys
    are planted for multi-key and multi-query; ``task.questions`` values are asked for at once in
    multi-value and multi-query. The words of common-words and frequent-words fill the prompt.

    Args:
        tokenizer: a fast one (it must give character offsets).
        filler: documents to plant in; made-up sentences of common words by default.
    Raises: InvalidRecipe where it does not fit; UnsupportedModel where the tokenizer gives no
        offsets.
    """
    rng = random.Random(f"{seed} {task.form} {task.tokens} {index}")
    form = RULER_FORMS[task.form]
    parts = form.parts(task, tokenizer, rng)
    room = _room(parts, tokenizer)
    filled = fill(task.tokens - room, parts.pieces, parts.end, tokenizer, filler, rng)
    if isinstance(filled, int):
        raise too_short(task, filled + room, by_facts=form.by_facts)
    return Prompt(filled.input_ids, parts.answers, room)


def _room(parts: _Parts, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Tokens to answer in: twice what answers need, and the same for all prompts of a task."""
    return 2 * len(encode(tokenizer, ", ".join(parts.like for _ in parts.answers)).ids) + 16


def _single_needle(task: Task, _: object, rng: random.Random) -> _Parts:
    return _one_of(1, rng)


def _multi_key(task: Task, _: object, rng: random.Random) -> _Parts:
    return _one_of(task.facts, rng)


def _multi_value(task: Task, _: object, rng: random.Random) -> _Parts:
    (key,) = word_pairs(1, rng)
    values = _numbers(task.questions, rng)
    pieces = [NEEDLE.fact.format(key=key, value=value) for value in values]
    return _Parts(pieces, SEVERAL.format(keys=key), tuple(values))


def _multi_query(task: Task, _: object, rng: random.Random) -> _Parts:
    pairs = _needles(task.facts, rng)
    asked = rng.sample(pairs, min(task.questions, len(pairs)))
    *most, last = [key for key, _ in asked]
    keys = f"{', '.join(most)} and {last}" if most else last
    return _Parts(_planted(pairs), SEVERAL.format(keys=keys), tuple(value for _, value in asked))


def _variable_tracking(task: Task, _: object, rng: random.Random) -> _Parts:
    names = _names(HOPS + 1, rng)
    value = str(rng.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in names)]
    pieces = [f" VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]
    return _Parts(pieces, VARIABLES.format(value=value, count=len(names)), tuple(names), "XQZJK")


def _common_words(repeats: int, rare: int) -> list[int]:
    return [COMMON_TO_RARE * repeats] * COMMON_WORDS + [repeats] * rare


def _frequent_words(length: int) -> list[int]:
    """A zeta distribution with alpha 2: the frequency falls with the square of the rank."""
    ranks = range(1, length + 1)
    return [count for rank in ranks if (count := round(length / (ZETA_2 * rank**2)))]


@dataclass(frozen=True)
class _List:
    """Words in random order, as many as fit, of which the first ``asked`` are to be named.

    frequencies: how often each word appears in a list of a size. least: the smallest size.
    """

    end: str
    separator: str
    asked: int
    frequencies: Callable[[int], list[int]]
    least: int

    def parts(self, size: int, rng: random.Random) -> _Parts:
        counts = self.frequencies(size)
        words = word_pairs(len(counts), rng)
        text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        rng.shuffle(text)
        end = self.end.format(words=self.separator.join(text))
        return _Parts([], end, tuple(words[: self.asked]), "walnut-village")


def _longest(
    lists: Sequence[_List], task: Task, tokenizer: "PreTrainedTokenizerBase", rng: random.Random
) -> _Parts:
    """The first of ``lists`` that fits, nearly as long as fits.

    Raises: InvalidRecipe where none does.
    """

    seed = rng.random()  # the same at each size: its words begin with those of a smaller one

    def made(kind: _List, size: int) -> tuple[_Parts, int]:
        parts = kind.parts(size, random.Random(seed))
        text = len(encode(tokenizer, parts.end).ids)
        return parts, text + _room(parts, tokenizer) + 4 * MIN_SPARE

    for kind in lists:
        best, least_tokens = made(kind, kind.least)
        if least_tokens > task.tokens:
            continue
        size = 2 * kind.least
        for _ in range(SIZINGS):
            parts, tokens = made(kind, size)
            if tokens <= task.tokens:
                best = parts
                if tokens >= 0.95 * task.tokens:
                    break
            each = max(1, tokens - least_tokens) / (size - kind.least)
            size = kind.least + max(1, int(0.98 * (task.tokens - least_tokens) / each))
        return best
    raise too_short(task, least_tokens, by_facts=False)


def _one_of(facts: int, rng: random.Random) -> _Parts:
    pairs = _needles(facts, rng)
    key, value = rng.choice(pairs)
    return _Parts(_planted(pairs), NEEDLE.question.format(key=key).rstrip(), (value,))


def _needles(count: int, rng: random.Random) -> list[tuple[str, str]]:
    return list(zip(word_pairs(count, rng), _numbers(count, rng), strict=True))


def _planted(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [NEEDLE.fact.format(key=key, value=value) for key, value in pairs]


def _numbers(count: int, rng: random.Random) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _names(count: int, rng: random.Random) -> list[str]:
    """Different words of five capital letters."""
    letters = len(string.ascii_uppercase)
    names = []
    for number in rng.sample(range(letters**5), count):
        digits = [number // letters**place % letters for place in range(5)]
        names.append("".join(string.ascii_uppercase[digit] for digit in digits))
    return names


_MOST_COMMON = (
    "\n\nBelow is a list of words, some of which appear more often than others.\n\n{words}\n\n"
    "Question: what are the 10 most common words in the list above?"
    " Answer: the 10 words that appear most often in the list above are:"
)
_MOST_FREQUENT = (
    "\n\nBelow is a coded text. Some of its words appear more often than others.\n\n{words}\n\n"
    "Question: what are the three most frequent words in the coded text above?"
    " Answer: the three most frequent words in the coded text above are:"
)
_COMMON = [
    _List(_MOST_COMMON, "\n", COMMON_WORDS, partial(_common_words, repeats), 2 * COMMON_WORDS)
    for repeats in (3, 2, 1)
]
_FREQUENT = [_List(_MOST_FREQUENT, " ", 3, _frequent_words, 60)]


@dataclass(frozen=True)
class RulerForm:
    """``parts``: what a task's prompt is made of, by task, tokenizer and random generator.

    by_facts: whether the task's ``facts`` and ``questions`` make it longer.
    """

    parts: Callable[[Task, "PreTrainedTokenizerBase", random.Random], _Parts]
    by_facts: bool = False


RULER_FORMS = {
    "single-needle": RulerForm(_single_needle),
    "multi-key": RulerForm(_multi_key, by_facts=True),
    "multi-value": RulerForm(_multi_value, by_facts=True),
    "multi-query": RulerForm(_multi_query, by_facts=True),
    "variable-tracking": RulerForm(_variable_tracking),
    "common-words": RulerForm(partial(_longest, _COMMON)),
    "frequent-words": RulerForm(partial(_longest, _FREQUENT)),
}
