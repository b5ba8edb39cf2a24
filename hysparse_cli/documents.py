"""Documents from a file: parquet; JSON lines or plain text, as they are or with xz or gzip."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hysparse_cli.errors import InvalidRecipe, UnreadableInput

_COMPRESSED = (".xz", ".gz")
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = ".parquet"
_PIECE_CHARACTERS = 1 << 20
_BATCH_ROWS = 64


def read_documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """The texts of ``path``, in its order; empty ones are left out.

    A ``.jsonl`` file (or ``.jsonl.xz``, ``.jsonl.gz``) holds one JSON object a line, whose
    ``text_field`` is a document; a ``.parquet`` file one a row, in that column. Any other file is
    plain text and one document, which comes in pieces of about a million characters that end where
    a line does.

    Raises: UnreadableInput where the file is missing or corrupt, or a line is not as said above; it
        names the line. InvalidRecipe where a parquet file is given and pyarrow is not installed.
    """
    if path.suffix == _PARQUET:
        yield from _parquet_rows(path, text_field)
        return
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


def text_of(record: Any, text_field: str, where: str) -> str:
    """The text of a record; one without a text (null) is empty.

    Args:
        where: the file and the line, or the like, for the message.
    Raises: UnreadableInput where there is no such field, or it holds something else.
    """
    fields = list(record) if isinstance(record, dict) else []
    if text_field not in fields:
        known = ", ".join(map(repr, fields[:8])) or "none"
        raise UnreadableInput(
            f"data {where} has no field {text_field!r} (it has: {known}): name the right one as "
            "text_field"
        )
    text = record[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UnreadableInput(
            f"data {where}: field {text_field!r} holds a {type(text).__name__}, not text"
        )
    return text


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
        if text := text_of(record, text_field, f"{path}, line {number}"):
            yield text


def _pieces(file: IO[str]) -> Iterator[str]:
    while piece := file.read(_PIECE_CHARACTERS):
        piece += file.readline()
        if piece.strip():
            yield piece


def _parquet_rows(path: Path, text_field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InvalidRecipe(
            f"data {path} needs the package pyarrow: pip install 'hysparse[data]'"
        ) from None
    number = 0
    try:
        with ParquetFile(path) as file:
            known = [name for name in file.schema_arrow.names if name == text_field]
            for batch in file.iter_batches(_BATCH_ROWS, columns=known or None):
                for record in batch.to_pylist():
                    number += 1
                    if text := text_of(record, text_field, f"{path}, row {number}"):
                        yield text
    except ArrowException as error:
        reason = " ".join(str(error).split())
        raise UnreadableInput(f"data {path} is not a parquet file: {reason}") from None
    except OSError as error:
        raise UnreadableInput(f"data {path}: {error.strerror or error}") from None
