"""Documents from a file: JSON lines or plain text, as they are or compressed with xz or gzip."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hysparse_cli.errors import UnreadableInput

_COMPRESSED = (".xz", ".gz")
_JSON_LINES = (".jsonl", ".ndjson")
_PIECE_CHARACTERS = 1 << 20


def read_documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """The texts of ``path``, in its order; empty ones are left out.

    A ``.jsonl`` file (or ``.jsonl.xz``, ``.jsonl.gz``) holds one JSON object a line, whose
    ``text_field`` is a document. Any other file is plain text and one document, which comes in
    pieces of about a million characters that end where a line does.

    Raises: UnreadableInput where the file is missing or corrupt, or a line is not as said above; it
        names the line.
    """
    plain_name = path.with_suffix("") if path.suffix in _COMPRESSED else path
    try:
        with _open(path) as file:
            if plain_name.suffix in _JSON_LINES:
                yield from _json_lines(file, path, text_field)
            else:
                yield from _pieces(file)
    except UnicodeDecodeError as error:
        raise UnreadableInput(f"data {path} is not UTF-8 text: {error.reason}") from None
    except (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableInput(
            f"data {path} is corrupt: {error}; copy or download it again"
        ) from None
    except OSError as error:
        raise UnreadableInput(f"data {path}: {error.strerror or error}") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_lines(file: IO[str], path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UnreadableInput(f"data {path}, line {number} is not JSON: {error.msg}") from None
        fields = list(record) if isinstance(record, dict) else []
        if text_field not in fields:
            known = ", ".join(map(repr, fields[:8])) or "none"
            raise UnreadableInput(
                f"data {path}, line {number} has no field {text_field!r} (it has: {known}): "
                "name the right one as text_field"
            )
        text = record[text_field]
        if not isinstance(text, str):
            raise UnreadableInput(
                f"data {path}, line {number}: field {text_field!r} holds a "
                f"{type(text).__name__}, not text"
            )
        if text:
            yield text


def _pieces(file: IO[str]) -> Iterator[str]:
    while piece := file.read(_PIECE_CHARACTERS):
        piece += file.readline()
        if piece.strip():
            yield piece
