"""Cuts long text into pieces that bound a tokenizer's memory, and gives the tokens of the whole.

A piece is tokenized with some text before and after it, whose tokens are left out again. So its
tokens are those of the whole text wherever a tokenizer needs no more than CONTEXT_CHARACTERS to
either side to find where a token begins: all that split text at spaces or line ends do, unless a
word is longer than that. A text of up to PIECE_CHARACTERS is always tokenized whole.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

PIECE_CHARACTERS = 1 << 20
CONTEXT_CHARACTERS = 1 << 12


class Piece(NamedTuple):
    """A part of a document; ``before`` is empty in the first, ``after`` in the last."""

    text: str
    before: str = ""
    after: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole document."""
        return not self.before and not self.after


def cut(chunks: Iterable[str]) -> Iterator[Piece]:
    """A document, given as ``chunks``, in pieces that end with a line, or else with a word."""
    before = text = ""
    for part in _parts(chunks):
        text += part
        while len(text) > PIECE_CHARACTERS + CONTEXT_CHARACTERS:
            end = _place(text)
            yield Piece(text[:end], before, text[end : end + CONTEXT_CHARACTERS])
            before, text = text[max(0, end - CONTEXT_CHARACTERS) : end], text[end:]
    if text:
        yield Piece(text, before)


def encode(tokenizer: Any, document: str) -> list[int]:
    """The token ids of a document of any length, special ones as the tokenizer adds them."""
    return [token for piece in cut([document]) for token in encode_piece(tokenizer, piece)]


def encode_piece(tokenizer: Any, piece: Piece) -> list[int]:
    """The token ids of a piece; special ones that the tokenizer adds are at the document's ends.

    A tokenizer without offsets (a slow one) reads each piece on its own.
    """
    if piece.is_whole:
        whole: list[int] = tokenizer(piece.text, verbose=False)["input_ids"]
        return whole
    if not tokenizer.is_fast:
        first = not piece.before
        alone: list[int] = tokenizer(piece.text, add_special_tokens=first, verbose=False)[
            "input_ids"
        ]
        return alone
    output = tokenizer(
        piece.before + piece.text + piece.after,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ids, places = output["input_ids"], output["offset_mapping"]
    special = output["special_tokens_mask"]
    first_of_text = special.index(0) if 0 in special else len(ids)
    begin, end = len(piece.before), len(piece.before) + len(piece.text)

    def belongs(i: int) -> bool:
        if special[i]:
            return not piece.before if i < first_of_text else not piece.after
        place = places[i][0]
        return (place >= begin or not piece.before) and (place < end or not piece.after)

    return [ids[i] for i in range(len(ids)) if belongs(i)]


def _parts(chunks: Iterable[str]) -> Iterator[str]:
    for chunk in chunks:
        for begin in range(0, len(chunk), PIECE_CHARACTERS):
            yield chunk[begin : begin + PIECE_CHARACTERS]


def _place(text: str) -> int:
    """Where to end a piece: behind a line end, or before a space, or anywhere."""
    half = PIECE_CHARACTERS // 2
    line = text.rfind("\n", half, PIECE_CHARACTERS)
    space = text.rfind(" ", half, PIECE_CHARACTERS)
    if line > 0:
        return line + 1
    return space if space > 0 else PIECE_CHARACTERS
