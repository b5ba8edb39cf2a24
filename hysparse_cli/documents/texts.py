"""A text file: one document, in chunks."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from hysparse_cli.documents.rows import broken, mend
from hysparse_cli.errors import UnreadableInput

CHUNK_CHARACTERS = 1 << 20
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")


def text_chunks(file: TextIO, path: Path) -> Iterator[str]:
    """The text of ``file`` as it is.

    Raises: UnreadableInput where it holds what no text does; it names the line.
    """
    line = 1
    while chunk := file.read(CHUNK_CHARACTERS):
        if found := _NOT_TEXT.search(chunk):
            number = line + chunk.count("\n", 0, found.start())
            if found[0] == "\0":
                raise UnreadableInput(
                    f"data {path}, line {number:,} holds binary data (a NUL byte): it is no text "
                    "file, or damaged"
                )
            raise UnreadableInput(
                f"data {path}, line {number:,} holds {broken(found[0])}: {mend(found[0])}"
            )
        line += chunk.count("\n")
        yield chunk
