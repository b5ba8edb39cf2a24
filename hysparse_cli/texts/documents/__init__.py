"""Documents from a file, for all that read text: training, evaluation, calibration, inspection.

A record of jsonl, json, csv, tsv or parquet is a document, and so is a whole text file. Each comes
as chunks, so that a text file of any size is one document in bounded memory.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.texts.documents.files import Kind, OnRead, data_file, decoded
from hysparse_cli.texts.documents.json_rows import json_lines, json_values
from hysparse_cli.texts.documents.rows import BadRows, Rows, text_of
from hysparse_cli.texts.documents.tables import csv_rows, parquet_rows
from hysparse_cli.texts.documents.texts import text_chunks

__all__ = ["BadRows", "read_chunks", "read_documents", "text_of"]


def read_documents(
    path: Path,
    text_field: str = "text",
    *,
    most_characters: int | None = None,
    bad_rows: BadRows | None = None,
    on_read: OnRead = lambda done, total: None,
) -> Iterator[str]:
    """The texts of ``path``, in its order; those without a letter are left out.

    Args: as for ``read_chunks``.
        most_characters: end after about so many, perhaps within a document; None reads all.
    Raises: as ``read_chunks``.
    """
    left = most_characters
    for chunks in read_chunks(path, text_field, bad_rows, on_read):
        text = "".join(chunks if left is None else _up_to(left, chunks))
        if text.strip():
            yield text
            left = None if left is None else left - len(text)
        if left is not None and left <= 0:
            return


def read_chunks(
    path: Path,
    text_field: str = "text",
    bad_rows: BadRows | None = None,
    on_read: OnRead = lambda done, total: None,
) -> Iterator[Iterable[str]]:
    """Each document of ``path`` in chunks of text, to be read before the next document.

    The format is what the ending says, whatever its case, or the content where there is none:
    files.py. jsonl and json are told apart by content, since either often bears the other's name.
    A document is ``text_field`` of a record or of a row, or a whole text file. A record whose text
    is missing (null), empty or blank is left out.

    Args:
        bad_rows: what to do with a row that holds no such text; None refuses the first.
        on_read: told the bytes read, and those of the file.
    Raises: UnreadableInput where the file is missing, damaged or of no known format, or a row is
        bad; it names the line. InvalidRecipe where a package that reads it is not installed.
    """
    bad_rows = bad_rows or BadRows()
    with data_file(path, text_field, on_read) as (kind, file):
        if kind == "text":
            with decoded(file) as text:
                yield text_chunks(text, path)
            return
        for where, record in _rows(kind, file, path, text_field, on_read):
            try:
                text_of_row = text_of(record(), text_field, where)
            except UnreadableInput as error:
                bad_rows.take(error)
                continue
            if text_of_row and not text_of_row.isspace():
                yield (text_of_row,)


def _rows(kind: Kind, file: BinaryIO, path: Path, text_field: str, on_read: OnRead) -> Rows:
    if kind == "parquet":
        yield from parquet_rows(file, path, text_field, on_read)
        return
    with decoded(file, newline=None if kind in ("jsonl", "json") else "") as text:
        if kind == "jsonl":
            yield from json_lines(text, path)
        elif kind == "json":
            yield from json_values(text, path)
        else:
            yield from csv_rows(text, path, text_field, "," if kind == "csv" else "\t")


def _up_to(characters: int, chunks: Iterable[str]) -> Iterator[str]:
    for chunk in chunks:
        yield chunk
        characters -= len(chunk)
        if characters <= 0:
            return
