"""Reads the rows of tables: csv, tsv and parquet."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.printable import single_line
from hysparse_cli.texts.documents.files import OnRead
from hysparse_cli.texts.documents.json_rows import lines
from hysparse_cli.texts.documents.rows import MOST_CHARACTERS, Rows, missing, too_long

_BATCH_ROWS = 64


def csv_rows(file: TextIO, path: Path, text_field: str, separator: str) -> Rows:
    """The rows below the first, which names the columns; as many cells in each.

    Raises: UnreadableInput where the first row does not name ``text_field`` once.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MOST_CHARACTERS))
    reader = csv.reader(_short_lines(file, path), delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1:,}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            refusal = _misquoted(where, error)
            if names is None:
                raise refusal from None
            yield where, partial(_refuse, refusal)
            continue
        if not cells:
            continue  # a blank line
        if names is None:
            names = cells
            _check_names(names, text_field, where)
            continue
        yield where, partial(_record, names, cells, text_field, where)


def parquet_rows(file: BinaryIO, path: Path, text_field: str, on_read: OnRead) -> Rows:
    """The rows of a parquet file, in its order.

    Raises: UnreadableInput where it is none, or damaged; InvalidRecipe where pyarrow is missing.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InvalidRecipe(
            f"data {path} needs the package pyarrow: pip install 'hysparse[data]'"
        ) from None
    size, number = path.stat().st_size, 0
    try:
        table = ParquetFile(file)
        total = max(1, table.metadata.num_rows)
        names = table.schema_arrow.names
        if text_field not in names and table.metadata.num_rows:
            raise missing(text_field, names, f"{path}, row 1")
        known = [name for name in names if name == text_field]
        for batch in table.iter_batches(_BATCH_ROWS, columns=known):
            for cell in batch.column(0):
                number += 1
                where = f"{path}, row {number:,}"
                yield where, partial(_cell, cell, text_field, where)
            on_read(size * number // total, size)
    except ArrowException as error:
        raise UnreadableInput(
            f"data {path} is not a parquet file, or damaged: {single_line(error)}"
        ) from None


def _short_lines(file: TextIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(lines(file), start=1):
        if len(line) == MOST_CHARACTERS:
            raise too_long(f"{path}, line {number:,}")
        yield line


def _check_names(names: list[str], text_field: str, where: str) -> None:
    if names.count(text_field) > 1:
        raise UnreadableInput(
            f"data {where} names {names.count(text_field)} columns {text_field!r}: rename all but "
            "one"
        )
    if text_field not in names:
        refusal = missing(text_field, names, where)
        for mark in (";", "\t", ","):
            if len(names) == 1 and mark in names[0]:
                advice = f"its columns seem to be separated by {mark!r}: save it as csv or tsv"
                raise UnreadableInput(f"{refusal}; {advice}")
        raise refusal


def _record(names: list[str], cells: list[str], text_field: str, where: str) -> dict[str, str]:
    if len(cells) != len(names):
        raise UnreadableInput(
            f"data {where} has {len(cells)} columns, and the first line names {len(names)}: put "
            "quotes around text that holds a separator"
        )
    text = cells[names.index(text_field)]
    if "\0" in text:
        raise UnreadableInput(f"data {where} holds binary data (a NUL byte): mend that row")
    return {text_field: text}


def _cell(cell: Any, text_field: str, where: str) -> dict[str, Any]:
    try:
        return {text_field: cell.as_py()}
    except ValueError as error:  # bytes that are no UTF-8 in a column of text, a date out of range
        raise UnreadableInput(
            f"data {where}: field {text_field!r} can't be read: {single_line(error)}"
        ) from None


def _misquoted(where: str, error: csv.Error) -> UnreadableInput:
    return UnreadableInput(
        f"data {where} is not a valid row: {single_line(error)}; a quote within text in quotes is "
        "written twice"
    )


def _refuse(error: UnreadableInput) -> Any:
    raise error
