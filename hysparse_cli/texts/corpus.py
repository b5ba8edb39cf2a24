"""Reads the documents to train on, from any place that a saved state names."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from hysparse_cli.errors import InvalidRecipe, UnreadableInput, reads
from hysparse_cli.printable import single_line
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.texts.documents import BadRows, read_chunks, text_of
from hysparse_cli.texts.documents.files import check_file
from hysparse_cli.texts.documents.pieces import Piece, cut

HUB = "hub:"
SKIP_FLAG = "--skip-bad-rows"

Position = Any  # of a piece; made of numbers, strings, lists and dicts, so that it can be saved
OnRead = Callable[[int, int], None]


class Corpus(Protocol):
    """Documents in a fixed order; ``name`` is for messages.

    ``bad_rows``: what was skipped so far; in a file that was checked, all there is.
    """

    name: str
    bad_rows: BadRows

    def check(self, on_read: OnRead) -> None:
        """Read all that lies here once, so that a bad row is found before the run, not in it.

        Args:
            on_read: told the bytes read, and how many there are.
        Raises: UnreadableInput where a row is bad and not to be skipped, or there is no text.
        """

    def pieces(self, begin: Position | None) -> Iterator[tuple[Position | None, Piece]]:
        """Each document in its pieces, and where ``begin`` must be to start with that one.

        Args:
            begin: None is the first document's.
        Raises: UnreadableInput where the texts can't be read.
        """


def corpus_of(options: FinetuneOptions) -> Corpus:
    """The documents that ``data`` names: a file, or with "hub:" before it a data set.

    Raises: InvalidRecipe where a package that reads them is missing, or the options don't belong
        together; UnreadableInput where there is no such file or data set.
    """
    assert options.data is not None
    if options.data.startswith(HUB):
        return _DataSet(options.data.removeprefix(HUB), options)
    if options.data_subset is not None:
        raise InvalidRecipe("finetune.data_subset belongs to a data set (data: hub:NAME): leave it")
    return _File(Path(options.data), options)


class _File:
    def __init__(self, path: Path, options: FinetuneOptions):
        if path.is_dir():
            raise UnreadableInput(
                f"data {path} is a folder: give one file, or hub:{path} to read all of its jsonl, "
                "parquet or text files"
            )
        check_file(path)
        self.name, self.path, self.text_field = str(path), path, options.text_field
        self.bad_rows = BadRows(options.skip_bad_rows, SKIP_FLAG)
        self._as_it_was = self._as_it_is()

    def check(self, on_read: OnRead) -> None:
        found = False
        for document in read_chunks(self.path, self.text_field, self.bad_rows, on_read):
            for chunk in document:
                found = found or not chunk.isspace()
        if not found:
            raise self.bad_rows.no_text(self.name)

    def pieces(self, begin: Position | None) -> Iterator[tuple[Position | None, Piece]]:
        return islice(enumerate(self._all_pieces()), begin or 0, None)

    def _all_pieces(self) -> Iterator[Piece]:
        seen = BadRows(self.bad_rows.skip, self.bad_rows.flag)
        for document in read_chunks(self.path, self.text_field, seen):
            for piece in cut(document):
                self._check_unchanged()
                yield piece
        self._check_unchanged()
        if seen.count > self.bad_rows.count:
            self.bad_rows = seen

    def _check_unchanged(self) -> None:
        """What was checked, and what a saved state counts in, must be what is read."""
        if self._as_it_is() != self._as_it_was:
            raise UnreadableInput(
                f"data {self.path} was changed while the run read it: give a copy that nothing "
                "writes to, and begin again"
            )

    def _as_it_is(self) -> tuple[int, int]:
        with reads(self.path):
            status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns


class _DataSet:
    """A data set of the hub, or a folder of files, streamed: nothing is downloaded in advance.

    A position is the stream's state before a record, the number of that record, and of a piece.
    """

    def __init__(self, name: str, options: FinetuneOptions):
        try:
            from datasets import disable_progress_bars, load_dataset
            from datasets.utils.logging import set_verbosity
        except ImportError:
            raise InvalidRecipe(
                f"data {HUB}{name} needs the package datasets: pip install 'hysparse[data]'"
            ) from None
        self.name, self.text_field = HUB + name, options.text_field
        self.bad_rows = BadRows(options.skip_bad_rows, SKIP_FLAG)
        disable_progress_bars()
        set_verbosity(logging.CRITICAL)  # what goes wrong is said once, by us
        with self._read():
            self._stream: Any = load_dataset(
                os.path.expanduser(name),
                options.data_subset,
                split=options.data_split,
                streaming=True,
            )

    @contextmanager
    def _read(self) -> Iterator[None]:
        """Whatever fails in other people's readers of other people's files is the input's."""
        try:
            yield
        except Exception as error:
            raise UnreadableInput(
                f"data {self.name} can't be read: {single_line(error)}"
            ) from error

    def check(self, on_read: OnRead) -> None:
        """Nothing: a stream is checked as it is read."""

    def pieces(self, begin: Position | None) -> Iterator[tuple[Position | None, Piece]]:
        stream = self._stream.skip(0)  # a copy, which keeps the state it loads
        state, number, first_piece = begin or (None, 0, 0)
        if state is not None:
            stream.load_state_dict(state)
        records = iter(stream)
        while True:
            with self._read():
                record = next(records, None)
            if record is None:
                return
            try:
                where = f"{self.name}, row {number + 1:,}"
                text = text_of(record, self.text_field, where)
            except UnreadableInput as error:
                self.bad_rows.take(error)
                text = ""
            if text.strip():
                for index, piece in islice(enumerate(cut([text])), first_piece, None):
                    yield [state, number, index], piece
            state, number, first_piece = stream.state_dict(), number + 1, 0
