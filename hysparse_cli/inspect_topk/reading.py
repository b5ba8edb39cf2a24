"""Makes what the model reads: a prompt, a file's first document, or made-up calibration text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.recipe import InspectOptions
from hysparse_cli.texts.calibration import calibration_text
from hysparse_cli.texts.documents import read_documents
from hysparse_cli.texts.encoded import encode

CHARACTERS_OF_A_TOKEN = 16  # on average, at most: so much of a document is read for each


@dataclass(frozen=True)
class Asked:
    """Token ranges [begin, end) of what is looked for; ``answer`` is empty at the text's end.

    The queries that look are those that predict the answer, or the next token without one.
    """

    needle: tuple[int, int]
    answer: tuple[int, int]

    @property
    def queries(self) -> list[int]:
        begin, end = self.answer
        return list(range(begin - 1, max(end - 1, begin)))


@dataclass(frozen=True)
class Reading:
    """``source`` says where the text is from. ``asked``: None without a needle.

    looking: the queries that predict an answer, the needle's or those of planted facts.
    """

    ids: list[int]
    source: str
    asked: Asked | None
    looking: list[int]


def read(tokenizer: Any, options: InspectOptions, longest: int) -> Reading:
    """The tokens to read, at most ``options.max_tokens`` and the ``longest`` that the model reads.

    Raises: InvalidRecipe where there are two texts, the text lacks the needle, or the answer would
        be cut off; UnreadableInput where the text is missing or empty; UnsupportedModel for a
        tokenizer without offsets.
    """
    tokens = min(options.max_tokens, longest)
    if options.prompt is not None and options.data is not None:
        raise InvalidRecipe("inspect-topk reads one text: give either --prompt or --data")
    if options.needle is None and options.answer is not None:
        raise InvalidRecipe("answer is for a needle: give --needle too")
    if options.prompt is not None or options.data is not None:
        text, source = _text(options)
        if options.needle is not None:
            return _with_needle(tokenizer, text, source, options.needle, options.answer, tokens)
        return Reading(encode(tokenizer, text).ids[:tokens], source, None, [])
    if options.needle is not None:
        raise InvalidRecipe("the needle has to be in a text: give --prompt or --data")
    made_up = calibration_text(
        tokenizer,
        data=None,
        text_field=options.text_field,
        tokens=tokens,
        sequence_tokens=tokens,
        seed=options.seed,
    )
    looking = (made_up.answers[0].nonzero()[:, 0] - 1).tolist()
    return Reading(made_up.rows[0].tolist(), "made-up text with planted facts", None, looking)


def _text(options: InspectOptions) -> tuple[str, str]:
    if options.prompt is not None:
        text: str | None = options.prompt
        where = "the prompt"
    else:
        assert options.data is not None
        documents = read_documents(
            Path(options.data),
            options.text_field,
            most_characters=CHARACTERS_OF_A_TOKEN * options.max_tokens,
        )
        text = next(documents, None)
        where = f"data {options.data}"
    if text is None or not text.strip():
        raise UnreadableInput(f"{where} holds no text: give some")
    return text, where


def _with_needle(
    tokenizer: Any, text: str, source: str, needle: str, answer: str | None, tokens: int
) -> Reading:
    text = text.rstrip("\n")
    end = len(text)
    if answer is not None:
        end = len(text) - len(answer) if text.endswith(answer) else len(text)
        text = text[:end] + answer
    place = text.find(needle, 0, end) if needle else -1
    if place < 0:
        raise InvalidRecipe(f"needle {needle!r} is not in the text of {source} before the answer")
    encoded = encode(tokenizer, text)
    if len(encoded.ids) > tokens:
        raise InvalidRecipe(
            f"{source} has {len(encoded.ids):,} tokens and {tokens:,} are read, which cuts the "
            "answer off: raise inspect_topk.max_tokens where the model reads more, or shorten it"
        )
    here = (len(encoded.ids), len(encoded.ids))
    if answer:
        here = encoded.tokens_of(end, len(text))
    asked = Asked(encoded.tokens_of(place, place + len(needle)), here)
    return Reading(encoded.ids, source, asked, asked.queries)
