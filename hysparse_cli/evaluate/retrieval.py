"""Contexts that plant facts and ask for them, of an exact token length, for any tokenizer.

Three forms plant facts (keys and values drawn afresh for each context) at random places of filler
text and ask for some of them at the end; ``recall`` lists pairs, then the same pairs again in
random order until the context is full. Everything follows from a seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.evaluate.encoded import Encoded, encode
from hysparse_cli.evaluate.words import WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["magic-number", "secret", "key-value", "recall"]
FORMS: tuple[Form, ...] = get_args(Form)
MAX_RECALL_PAIRS = 64
MIN_SPARE, MAX_SPARE = 8, 64


@dataclass(frozen=True)
class Wording:
    """How a form plants a fact, asks for it up to the answer, and goes on after the answer.

    Values are 7 digits or a word, one as likely as the other.
    """

    fact: str
    question: str
    end: str


WORDINGS = {
    "magic-number": Wording(
        " One of the special magic numbers for {key} is: {value}.",
        " What is the special magic number for {key} mentioned in the provided text?"
        " The special magic number for {key} mentioned in the provided text is: ",
        ".",
    ),
    "secret": Wording(
        " The secret of {key} is {value}.",
        " Question: what is the secret of {key}? Answer: the secret of {key} is ",
        ".",
    ),
    "key-value": Wording("\n{key} = {value}\n", "\n{key} = ", "\n"),
}


@dataclass(frozen=True)
class Task:
    """What to make: ``form`` in ``tokens`` tokens, the tokenizer's leading special ones included.

    The last answer ends the context, or nearly. ``facts`` does not count for ``recall``, which
    lists as many pairs as fit in half the context, at most 64.
    """

    form: Form
    tokens: int
    facts: int = 8
    questions: int = 4


@dataclass(frozen=True)
class Context:
    """One context. ``answers`` are the token ranges [begin, end) that a model should predict."""

    input_ids: list[int]
    answers: list[tuple[int, int]]


def write_context(
    task: Task,
    index: int,
    tokenizer: "PreTrainedTokenizerBase",
    filler: Sequence[str] | None = None,
    seed: int = 0,
) -> Context:
    """The ``index``-th context of ``task``.

    Args:
        tokenizer: a fast one (it must give character offsets).
        filler: documents to plant facts in; made-up sentences of common words by default.
    Raises: InvalidRecipe where the facts and questions do not fit; UnsupportedModel where the
        tokenizer gives no offsets.
    """
    rng = random.Random(f"{seed} {task.form} {task.tokens} {index}")
    if task.form == "recall":
        return _recall(task, tokenizer, rng)
    return _planted(task, tokenizer, filler, rng)


class _Text:
    """Text under construction, and the character ranges of its answers."""

    def __init__(self) -> None:
        self.text = ""
        self.answers: list[tuple[int, int]] = []

    def add(self, piece: str) -> None:
        self.text += piece

    def add_answer(self, value: str) -> None:
        self.answers.append((len(self.text), len(self.text) + len(value)))
        self.text += value


def _planted(
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    filler: Sequence[str] | None,
    rng: random.Random,
) -> Context:
    wording = WORDINGS[task.form]
    numbers = rng.sample(range(len(WORDS) ** 2), task.facts)
    keys = [f"{WORDS[n // len(WORDS)]}-{WORDS[n % len(WORDS)]}" for n in numbers]
    pairs = [(key, _value(rng)) for key in keys]
    facts = [wording.fact.format(key=key, value=value) for key, value in pairs]
    questions = _Text()
    for key, value in rng.sample(pairs, min(task.questions, len(pairs))):
        questions.add(wording.question.format(key=key))
        questions.add_answer(value)
        questions.add(wording.end)
    fixed = len(encode(tokenizer, "".join(facts) + questions.text).ids)
    # What the joined text tokenizes to is known only afterwards: write some filler to spare, and
    # cut the surplus from its beginning, where nothing is planted.
    spare = MIN_SPARE
    while fixed + 2 * spare <= task.tokens and spare <= MAX_SPARE:
        excerpt = excerpt_of(tokenizer, filler, task.tokens - fixed + spare, rng)
        text, first_fact = _plant(facts, excerpt, encode(tokenizer, excerpt), 2 * spare, rng)
        encoded = encode(tokenizer, text + questions.text)
        surplus = len(encoded.ids) - task.tokens
        if 0 <= surplus <= encoded.content_tokens_before(first_fact):
            spans = [(len(text) + begin, len(text) + end) for begin, end in questions.answers]
            answers = [encoded.tokens_of(begin, end) for begin, end in spans]
            return Context(
                encoded.without_head(surplus),
                [(begin - surplus, end - surplus) for begin, end in answers],
            )
        spare *= 2
    raise _too_short(task, fixed + 2 * MIN_SPARE)


def _plant(
    facts: Sequence[str], excerpt: str, encoded: Encoded, head_tokens: int, rng: random.Random
) -> tuple[str, int]:
    """``excerpt`` with ``facts`` between its words, none in its first ``head_tokens`` tokens.

    Returns: the text, and the character where the first fact begins.
    """
    head = encoded.offsets[min(encoded.num_special + head_tokens, len(encoded.ids) - 1)][0]
    gaps = [i for i in range(head, len(excerpt)) if excerpt[i].isspace()]
    places = sorted(rng.choice(gaps or [len(excerpt)]) for _ in facts)
    pieces = []
    for begin, end, fact in zip([0, *places], places, facts, strict=False):
        pieces += [excerpt[begin:end], fact]
    return "".join(pieces) + excerpt[places[-1] :], places[0]


def excerpt_of(
    tokenizer: "PreTrainedTokenizerBase",
    filler: Sequence[str] | None,
    tokens: int,
    rng: random.Random,
) -> str:
    """Running text of ``tokens`` tokens or a few more, from a random place of ``filler``.

    Args:
        filler: documents, read on into the next where one ends; None for made-up sentences.
    """
    characters = 6 * tokens
    while True:
        text = _made_up(characters, rng) if filler is None else _cut(filler, characters, rng)
        encoded = encode(tokenizer, text)
        last = encoded.num_special + tokens - 1
        if last < len(encoded.ids):
            return text[: encoded.offsets[last][1]]
        characters *= 2


def _cut(filler: Sequence[str], characters: int, rng: random.Random) -> str:
    document = rng.randrange(len(filler))
    begin = rng.randrange(len(filler[document]))
    text = filler[document][begin : begin + characters]
    while len(text) < characters:
        document = (document + 1) % len(filler)
        text += "\n\n" + filler[document][: characters - len(text)]
    return text


def _made_up(characters: int, rng: random.Random) -> str:
    sentences: list[str] = []
    length = 0
    while length < characters:
        words = rng.choices(WORDS, k=rng.randint(5, 12))
        sentences.append(f"{' '.join(words).capitalize()}.")
        length += len(sentences[-1]) + 1
    return " ".join(sentences)


def _recall(task: Task, tokenizer: "PreTrainedTokenizerBase", rng: random.Random) -> Context:
    pairs = [(word, _value(rng)) for word in rng.sample(WORDS, MAX_RECALL_PAIRS)]
    least = max(2, task.questions)
    while 2 * len(encode(tokenizer, _listed(pairs)).ids) > task.tokens:
        if len(pairs) == least:
            raise _too_short(task, 2 * len(encode(tokenizer, _listed(pairs)).ids))
        pairs.pop()
    text = _Text()
    text.add(_listed(pairs))
    asked = [key for key, _ in pairs]
    encoded = encode(tokenizer, text.text)
    while len(encoded.ids) < task.tokens:
        for key, value in rng.sample(pairs, len(pairs)):
            text.add(f"\n{key}: ")
            text.add_answer(value)
            asked.append(key)
        encoded = encode(tokenizer, text.text)
    end = encoded.offsets[task.tokens - 1][1]
    # Keys that were mentioned just before would be too easy: ask for those half a round away.
    far = [
        span
        for line, span in enumerate(text.answers, len(pairs))
        if span[1] <= end and asked[line] not in asked[line - len(pairs) // 2 : line]
    ]
    answers = [encoded.tokens_of(*span) for span in far[-task.questions :]]
    return Context(encoded.ids[: task.tokens], answers)


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"\n{key}: {value}" for key, value in pairs)


def _value(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return str(rng.randrange(1_000_000, 10_000_000))
    return rng.choice(WORDS)


def _too_short(task: Task, needed: int) -> InvalidRecipe:
    return InvalidRecipe(
        f"retrieval_tokens {task.tokens} is too short for the {task.form} form with "
        f"{task.facts} facts and {task.questions} questions: give at least about {needed}, or "
        "fewer facts (eval.retrieval_facts) and questions (eval.retrieval_questions)"
    )
