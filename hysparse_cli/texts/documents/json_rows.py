"""Records of JSON: one a line, or one after the other over any lines, in a list or bare."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.files.reading import parse_json
from hysparse_cli.printable import single_line
from hysparse_cli.texts.documents.rows import MOST_CHARACTERS, Rows, too_long

_CHUNK_CHARACTERS = 1 << 16
_BLANK = " \t\r\n\ufeff"  # the last begins files, and is where such files were joined
_LONGEST_TOKEN = 16  # strings apart: what fails so close to the end may have been cut by it


def line_by_line(head: str) -> bool:
    """Whether what begins with ``head`` has a record in each line.

    It has not where it begins with a list, or a record, that goes on in the next line.
    """
    first, _, rest = head.replace("\r", "\n").lstrip(_BLANK).partition("\n")
    if first.startswith("["):
        return bool(rest.strip(_BLANK)) and _is_json(first)
    return _is_json(first) or not first.rstrip().endswith(("{", "[", ",", ":"))


def lines(file: TextIO) -> Iterator[str]:
    """The lines of ``file``; of one that is too long (``too_long``) only the beginning."""
    while line := file.readline(MOST_CHARACTERS):
        rest = line
        while len(rest) == MOST_CHARACTERS and not rest.endswith("\n"):
            rest = file.readline(MOST_CHARACTERS)
        yield line


def json_lines(file: TextIO, path: Path) -> Rows:
    """A record in each line that is not blank."""
    for number, line in enumerate(lines(file), start=1):
        where = f"{path}, line {number:,}"
        if len(line) == MOST_CHARACTERS:
            yield where, partial(_refuse, too_long(where))
        elif line := line.strip(_BLANK):
            yield where, partial(parse_json, line, f"data {where}")


def json_values(file: TextIO, path: Path) -> Rows:
    """The records of a list, or records one after the other.

    Raises: UnreadableInput where the file is no such JSON: what follows can't be made out then.
    """
    values, number = _Values(file, path), 0
    in_list = values.take("[")
    while values.peek():
        if in_list and values.take("]"):
            in_list = False
            if values.peek():
                raise values.refuse("something follows the end of its list of records")
            return
        if in_list and number and not values.take(","):
            raise values.refuse("a comma is missing between two records of its list")
        if not values.peek():
            break
        number += 1
        where, value = values.next_value(number)
        yield where, partial(_itself, value)
    if in_list:
        raise values.refuse("it ends within its list of records: copy or download it again")


class _Values:
    """JSON values read one at a time, as much text at once as the longest needs."""

    def __init__(self, file: TextIO, path: Path):
        self._file, self._path = file, path
        self._text, self._at, self._line = "", 0, 1
        self._ended = False
        self._decoder = json.JSONDecoder(parse_int=_integer)

    def peek(self) -> str:
        """The next character that is not blank; none at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANK:
                    return self._text[self._at]
                self._advance(self._at + 1)
            if not self._more():
                return ""

    def take(self, mark: str) -> bool:
        """Whether ``mark`` is next; if so, go on behind it."""
        if self.peek() != mark:
            return False
        self._advance(self._at + 1)
        return True

    def next_value(self, number: int) -> tuple[str, Any]:
        """The next value and where it begins."""
        self.peek()
        where = f"{self._path}, record {number:,} (line {self._line:,})"
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more():  # else a number may go on
                    self._advance(end)
                    return where, value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or (
                    error.pos > len(self._text) - _LONGEST_TOKEN
                )
                if not cut or not self._more():
                    raise UnreadableInput(
                        f"data {where} is not valid JSON: {single_line(error.msg)} (line "
                        f"{self._line + self._text.count(chr(10), self._at, error.pos):,})"
                    ) from None
            except RecursionError:
                raise UnreadableInput(f"data {where} is nested too deeply to be read") from None
            if len(self._text) - self._at > MOST_CHARACTERS:
                raise too_long(where)

    def refuse(self, reason: str) -> UnreadableInput:
        return UnreadableInput(
            f"data {self._path}, line {self._line:,} is not valid JSON: {reason}"
        )

    def _advance(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _more(self) -> bool:
        """Read on, as much again as is not used yet: a long value is parsed few times."""
        unused = len(self._text) - self._at
        chunk = "" if self._ended else self._file.read(max(_CHUNK_CHARACTERS, unused))
        self._ended = not chunk
        if chunk:
            self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _integer(digits: str) -> int:
    """Only its kind counts, and thousands of digits take long or are refused."""
    return int(digits[:18])


def _itself(value: Any) -> Any:
    return value


def _refuse(error: UnreadableInput) -> Any:
    raise error
