"""Reads the table of a saved state's tensors, a pickle, without running what it may hold.

torch unpickles ``.metadata`` whatever it names, and an entry that is no tensor once more. Here it
may name what such a table is made of and nothing else, and holds only tensors.
"""

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.serialization import _get_layout

from hysparse_cli.errors import UnreadableInput, reads
from hysparse_cli.printable import printable, single_line

MOST_BYTES = 256 << 20
_TABLE = (
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
ALLOWED: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in _TABLE},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("pathlib", "PosixPath"): PurePath,  # where it was saved
    ("pathlib._local", "PosixPath"): PurePath,
}


class Reader(FileSystemReader):
    """torch's reader of a state's folder, for folders that others may have written.

    The tensors themselves are read by ``torch.load(weights_only=True)``, as torch's reader does.

    Raises: UnreadableInput where the folder's table is none, or is more than that.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._table = read_table(folder / ".metadata")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._table.storage_meta = StorageMeta(load_id=self.load_id)
        return self._table


def read_table(path: Path) -> Metadata:
    """What ``.metadata`` holds.

    Raises: UnreadableInput where it names code, is no table of tensors, or names files elsewhere.
    """
    with reads(path), path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise UnreadableInput(f"{path} is larger than the {MOST_BYTES:,} bytes it may have")
    try:
        table: Metadata = _Unpickler(io.BytesIO(raw), str(path)).load()
        if not _is_table(table):
            raise ValueError("it holds no table of tensors")
    except UnreadableInput:
        raise
    except Exception as error:  # what is no such pickle can raise any
        reason = single_line(error)
        raise UnreadableInput(f"{path} can't be read: {reason}; begin again without it") from None
    return table


class _Unpickler(pickle._Unpickler):  # in Python: the one in C fills memory as a pickle bids it
    def __init__(self, file: io.BytesIO, where: str):
        super().__init__(file)
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise UnreadableInput(
            f"{self.where} names {printable(f'{module}.{name}', 100)}, which no saved state holds: "
            "it may be an attack, nothing of it was run; begin again without it"
        )


def _is_table(table: Any) -> bool:
    """Whether each entry is a tensor, in a file of the same folder."""
    return isinstance(table, Metadata) and all(
        [
            *(isinstance(e, TensorStorageMetadata) for e in table.state_dict_metadata.values()),
            *(_is_inside(place) for place in table.storage_data.values()),
        ]
    )


def _is_inside(place: Any) -> bool:
    name = place.relative_path
    return isinstance(name, str) and Path(name).name == name and not place.transform_descriptors
