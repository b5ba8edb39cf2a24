"""Writes contexts that plant facts and ask for them, of an exact token length.

Three forms plant facts (keys and values drawn afresh for each context) at random places of filler
text and ask for some of them at the end; ``recall`` lists pairs, then the same pairs again in
random order until the context is full. Everything follows from a seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.texts.encoded import encode
from hysparse_cli.texts.haystack import fill, reads_nothing
from hysparse_cli.texts.words import WORDS, word_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_RECALL_PAIRS = 64


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
RECALL = "recall"
FORMS = (*WORDINGS, RECALL)  # what ``write_context`` writes


@dataclass(frozen=True)
class Task:
    """What to make: ``form`` in ``tokens`` tokens, the tokenizer's leading special ones included.

    The last answer ends the context, or nearly. ``facts`` does not count for ``recall``, which
    lists as many pairs as fit in half the context, at most 64. A form of ruler.py is another kind:
    its context is a prompt, and room for the answer.
    """

    form: str
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
    """The ``index``-th context of ``task``, whose form is one of FORMS.

    Args:
        tokenizer: a fast one (it must give character offsets).
        filler: documents to plant facts in; made-up sentences of common words by default.
    Raises: InvalidRecipe where the facts and questions do not fit; UnsupportedModel where the
        tokenizer gives no offsets.
    """
    rng = random.Random(f"{seed} {task.form} {task.tokens} {index}")
    if task.form == RECALL:
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
    pairs = [(key, _value(rng)) for key in word_pairs(task.facts, rng)]
    facts = [wording.fact.format(key=key, value=value) for key, value in pairs]
    questions = _Text()
    for key, value in rng.sample(pairs, min(task.questions, len(pairs))):
        questions.add(wording.question.format(key=key))
        questions.add_answer(value)
        questions.add(wording.end)
    filled = fill(task.tokens, facts, questions.text, tokenizer, filler, rng)
    if isinstance(filled, int):
        raise too_short(task, filled)
    spans = [filled.encoded.tokens_of(filled.end + a, filled.end + b) for a, b in questions.answers]
    answers = [(begin - filled.surplus, end - filled.surplus) for begin, end in spans]
    return Context(filled.input_ids, answers)


def _recall(task: Task, tokenizer: "PreTrainedTokenizerBase", rng: random.Random) -> Context:
    pairs = [(word, _value(rng)) for word in rng.sample(WORDS, MAX_RECALL_PAIRS)]
    least = max(2, task.questions)
    while 2 * len(encode(tokenizer, _listed(pairs)).ids) > task.tokens:
        if len(pairs) == least:
            raise too_short(task, 2 * len(encode(tokenizer, _listed(pairs)).ids))
        pairs.pop()
    text = _Text()
    text.add(_listed(pairs))
    asked = [key for key, _ in pairs]
    encoded, rounds = encode(tokenizer, text.text), 1
    while len(encoded.ids) < task.tokens:
        for key, value in chain(*(rng.sample(pairs, len(pairs)) for _ in range(rounds))):
            text.add(f"\n{key}: ")
            text.add_answer(value)
            asked.append(key)
        before, encoded = len(encoded.ids), encode(tokenizer, text.text)
        if len(encoded.ids) == before:
            raise reads_nothing(tokenizer)
        tokens_a_round = (len(encoded.ids) - before) / rounds
        rounds = max(1, int(0.9 * (task.tokens - len(encoded.ids)) / tokens_a_round))
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


def too_short(task: Task, needed: int, *, by_facts: bool = True) -> InvalidRecipe:
    """What to raise where ``task`` needs ``needed`` tokens as drawn, and others of it may more.

    Args:
        by_facts: whether fewer facts and questions would make it shorter.
    """
    amount = remedy = ""
    if by_facts:
        amount = f" with {task.facts} facts and {task.questions} questions"
        remedy = ", or fewer facts (eval.retrieval_facts) and questions (eval.retrieval_questions)"
    return InvalidRecipe(
        f"retrieval_tokens {task.tokens} is too short for the {task.form} form{amount}: give at "
        f"least about {needed + needed // 8}{remedy}"
    )
