"""Where the documents to train on come from, and how to go on from one of them."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from hysparse_cli.documents import read_documents, text_of
from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.recipe import FinetuneOptions

HUB = "hub:"

Position = Any  # of a document; made of numbers, strings, lists and dicts, so that it can be saved


class Corpus(Protocol):
    """Documents in a fixed order; ``name`` is for messages."""

    name: str

    def documents(self, begin: Position | None) -> Iterator[tuple[Position | None, str]]:
        """Each text that is not empty, and where ``begin`` must be to start with it.

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
    return _File(Path(options.data), options.text_field)


class _File:
    def __init__(self, path: Path, text_field: str):
        if path.is_dir():
            raise UnreadableInput(
                f"data {path} is a folder: give one file, or hub:{path} to read all of its jsonl, "
                "parquet or text files"
            )
        if not path.is_file():
            raise UnreadableInput(f"data {path}: no such file")
        self.name, self.path, self.text_field = str(path), path, text_field

    def documents(self, begin: Position | None) -> Iterator[tuple[Position | None, str]]:
        numbered = enumerate(read_documents(self.path, self.text_field))
        return islice(numbered, begin or 0, None)


class _DataSet:
    """A data set of the hub, or a folder of files, streamed: nothing is downloaded in advance."""

    def __init__(self, name: str, options: FinetuneOptions):
        try:
            from datasets import disable_progress_bars, load_dataset
            from datasets.exceptions import DatasetsError
        except ImportError:
            raise InvalidRecipe(
                f"data {HUB}{name} needs the package datasets: pip install 'hysparse[data]'"
            ) from None
        self.name, self.text_field = HUB + name, options.text_field
        self._errors = (DatasetsError, OSError, ValueError)
        disable_progress_bars()
        try:
            self._stream: Any = load_dataset(
                str(Path(name).expanduser()),
                options.data_subset,
                split=options.data_split,
                streaming=True,
            )
        except self._errors as error:
            raise self._unreadable(error) from None

    def documents(self, begin: Position | None) -> Iterator[tuple[Position | None, str]]:
        stream, position = self._stream.skip(0), begin  # a copy, which keeps the state it loads
        if begin is not None:
            stream.load_state_dict(begin)
        try:
            for record in stream:
                if text := text_of(record, self.text_field, self.name):
                    yield position, text
                position = stream.state_dict()
        except self._errors as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> UnreadableInput:
        return UnreadableInput(f"data {self.name} can't be read: {' '.join(str(error).split())}")
