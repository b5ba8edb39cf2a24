"""Reads a text file as one document, in chunks."""

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.texts.documents.files import readable
from hysparse_cli.texts.documents.rows import broken, first_broken

CHUNK_CHARACTERS = 1 << 20


def text_chunks(file: TextIO, path: Path) -> Iterator[str]:
    """The text of ``file`` as it is.

    Raises: UnreadableInput where it can't be read, or holds what no text does; it names the line.
    """
    line, end = 1, "\n"
    while True:
        with readable(path):
            chunk = file.read(CHUNK_CHARACTERS)
        if not chunk:
            return
        place = chunk.find("\0")
        if place >= 0:
            raise UnreadableInput(
                f"data {path}, line {line + chunk.count(end, 0, place):,} holds binary data (a NUL "
                "byte): it is no text file, or damaged"
            )
        if (half := first_broken(chunk)) is not None:
            line += chunk.count(end, 0, half)
            raise UnreadableInput(f"data {path}, line {line:,} holds {broken(chunk[half])}")
        line += chunk.count(end)
        yield chunk
