"""Makes running text of an exact length in tokens, with pieces planted in it."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hysparse_cli.errors import UnsupportedModel
from hysparse_cli.texts.encoded import Encoded, encode
from hysparse_cli.texts.words import WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_SPARE, MAX_SPARE = 8, 64
MAX_DOUBLINGS = 8


class Filled(NamedTuple):
    """A text whose first ``surplus`` tokens are to be left out; ``end_text`` begins at ``end``."""

    encoded: Encoded
    surplus: int
    end: int

    @property
    def input_ids(self) -> list[int]:
        return self.encoded.without_head(self.surplus)


def fill(
    tokens: int,
    pieces: Sequence[str],
    end_text: str,
    tokenizer: "PreTrainedTokenizerBase",
    filler: Sequence[str] | None,
    rng: random.Random,
) -> Filled | int:
    """Filler with ``pieces`` at random places, in their order, and ``end_text`` at its end.

    Args:
        tokens: how many it is to be, the tokenizer's leading special ones included.
        filler: see ``excerpt_of``.
    Returns: the text; or, where it does not fit, about how many tokens it needs.
    """
    fixed = len(encode(tokenizer, "".join(pieces) + end_text).ids)
    # What the joined text tokenizes to is known only afterwards: write some filler to spare, and
    # cut the surplus from its beginning, where nothing is planted.
    spare = MIN_SPARE
    while fixed + 2 * spare <= tokens and spare <= MAX_SPARE:
        excerpt = excerpt_of(tokenizer, filler, tokens - fixed + spare, rng)
        text, first_piece = _plant(pieces, excerpt, encode(tokenizer, excerpt), 2 * spare, rng)
        encoded = encode(tokenizer, text + end_text)
        surplus = len(encoded.ids) - tokens
        if 0 <= surplus <= encoded.content_tokens_before(first_piece):
            return Filled(encoded, surplus, len(text))
        spare *= 2
    return fixed + 2 * MIN_SPARE


def _plant(
    pieces: Sequence[str], excerpt: str, encoded: Encoded, head_tokens: int, rng: random.Random
) -> tuple[str, int]:
    """``excerpt`` with ``pieces`` between its words, none in its first ``head_tokens`` tokens.

    Returns: the text, and the character where the first piece begins, or where the text ends.
    """
    head = encoded.offsets[min(encoded.num_special + head_tokens, len(encoded.ids) - 1)][0]
    gaps = [i for i in range(head, len(excerpt)) if excerpt[i].isspace()]
    places = sorted(rng.choice(gaps or [len(excerpt)]) for _ in pieces)
    parts = []
    for begin, end, piece in zip([0, *places], places, pieces, strict=False):
        parts += [excerpt[begin:end], piece]
    first, last = (places[0], places[-1]) if places else (len(excerpt), 0)
    return "".join(parts) + excerpt[last:], first


def excerpt_of(
    tokenizer: "PreTrainedTokenizerBase",
    filler: Sequence[str] | None,
    tokens: int,
    rng: random.Random,
) -> str:
    """Running text of ``tokens`` tokens or a few more, from a random place of ``filler``.

    Args:
        filler: documents, read on into the next where one ends; None for made-up sentences.
    Raises: UnsupportedModel where the tokenizer makes next to no tokens of it.
    """
    for patience in range(MAX_DOUBLINGS):
        characters = (6 * tokens) << patience
        text = _made_up(characters, rng) if filler is None else _cut(filler, characters, rng)
        encoded = encode(tokenizer, text)
        last = encoded.num_special + tokens - 1
        if last < len(encoded.ids):
            return text[: encoded.offsets[last][1]]
    raise reads_nothing(tokenizer)


def reads_nothing(tokenizer: "PreTrainedTokenizerBase") -> UnsupportedModel:
    """What to raise where text does not become longer in tokens."""
    return UnsupportedModel(
        f"tokenizer {type(tokenizer).__name__} makes next to no tokens of common words: check that "
        "it is the checkpoint's own"
    )


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
