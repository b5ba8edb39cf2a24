"""Takes the text out of a row of data, or says why it holds none."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.printable import printable

MOST_CHARACTERS = 1 << 25  # of a row: what is refused must not take all memory first

# Where a row is, for messages, and what makes it a record, or raises UnreadableInput.
Rows = Iterator[tuple[str, Callable[[], Any]]]

_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bytes: "binary data",
}
_SHOWN_FIELDS = 8
_BYTES = range(0xDC80, 0xDD00)  # what bytes that are no UTF-8 are decoded to


@dataclass
class BadRows:
    """What is done with rows that hold no text: the first is refused, or all are counted.

    ``count`` of them were skipped, and ``first`` says what was wrong with the first. ``flag`` is
    what a refusal says would skip them.
    """

    skip: bool = False
    flag: str | None = None
    count: int = 0
    first: str | None = None

    def take(self, error: UnreadableInput) -> None:
        """Raises: UnreadableInput, unless rows are skipped."""
        if not self.skip:
            advice = f"; or skip such rows with {self.flag}" if self.flag else ""
            raise UnreadableInput(f"{error}{advice}") from None
        self.count += 1
        self.first = self.first or str(error)

    def no_text(self, name: object) -> UnreadableInput:
        """What to raise where nothing was left."""
        if not self.count:
            return UnreadableInput(f"data {name} holds no text: give a file that does")
        return UnreadableInput(
            f"data {name} holds no text: {self.count:,} rows were skipped; the first: {self.first}"
        )

    def warnings(self, name: object) -> list[str]:
        if not self.count:
            return []
        return [f"{self.count:,} bad rows of {name} were skipped; the first: {self.first}"]

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "first": self.first}


def text_of(record: Any, text_field: str, where: str) -> str:
    """The text of a record; one without a text (null) is empty.

    Args:
        where: the file and the line, or the like, for the message.
    Raises: UnreadableInput where there is no such field, or it holds something else.
    """
    if not isinstance(record, dict):
        raise UnreadableInput(
            f"data {where} holds {_kind(record)}, where each row must hold named fields, such as "
            '{"text": "..."}'
        )
    if text_field not in record:
        raise missing(text_field, list(record), where)
    text = record[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UnreadableInput(
            f"data {where}: field {text_field!r} holds {_kind(text)}, not text: name another field "
            "as text_field, or mend that row"
        )
    if (place := first_broken(text)) is not None:
        raise UnreadableInput(
            f"data {where}: field {text_field!r} holds "
            f"{broken(text[place], f' at its character {place + 1:,}')}"
        )
    return text


def missing(text_field: str, fields: list[Any], where: str) -> UnreadableInput:
    """What to raise where ``fields`` lack ``text_field``."""
    known = ", ".join(f"'{printable(name, 60)}'" for name in fields[:_SHOWN_FIELDS]) or "none"
    more = ", ..." if len(fields) > _SHOWN_FIELDS else ""
    return UnreadableInput(
        f"data {where} has no field {text_field!r} (it has: {known}{more}): name the right one as "
        "text_field"
    )


def too_long(where: str) -> UnreadableInput:
    """What to raise where a row is longer than ``MOST_CHARACTERS``."""
    return UnreadableInput(
        f"data {where} is longer than the {MOST_CHARACTERS:,} characters that a row may have: "
        "split it into several, or give it as a text file"
    )


def first_broken(text: str) -> int | None:
    """Where the first lone surrogate of ``text`` is, which no UTF-8 text holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def broken(half: str, at: str = "") -> str:
    """What a lone surrogate is, ``at`` which place, and what to do about it, in words."""
    if ord(half) in _BYTES:
        byte = f"a byte that is not UTF-8 text (0x{ord(half) - 0xDC00:02x})"
        return f"{byte}{at}: save the file as UTF-8 in the program that wrote it"
    return (
        f"half a character (\\u{ord(half):04x}){at}: it was cut in the middle of a symbol, such as "
        "an emoji: mend that row"
    )


def _kind(value: Any) -> str:
    kind = _KINDS.get(type(value), "nothing" if value is None else f"a {type(value).__name__}")
    return f"{kind} ({printable(value, 30)})" if type(value) in (int, float, bool) else kind
