"""Writes safetensors shards as a stream: a chunk in memory at a time, never a shard.

A shard is a header and tensors. Unless a dtype is asked for, bytes go over as they are; on the way
every float is looked at for NaN and infinity.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from hysparse_cli.errors import UnreadableInput, reads
from hysparse_cli.files.checkpoint import Shard, StoredTensor
from hysparse_cli.printable import printable

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
STORED_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK_BYTES = 1 << 20
_ALIGNMENT = 8

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: ``values``, one in a source shard, or one of a constant ``fill``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: StoredTensor | None = None
    fill: float = 0.0
    values: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def pack(pieces: Sequence[Piece], max_bytes: int) -> list[list[Piece]]:
    """Split pieces, in their order, into shards of at most ``max_bytes`` (or one larger tensor)."""
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not groups or piece.size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(piece)
        room -= piece.size
    return groups


class ShardWriter:
    """Streams shards into a folder; ``non_finite`` counts, by tensor, NaN and infinite values."""

    def __init__(self, folder: Path, on_bytes: OnBytes) -> None:
        self.non_finite: Counter[str] = Counter()
        self._folder = folder
        self._on_bytes = on_bytes
        # one buffer for all: a fresh one for each chunk costs more than the copy itself
        self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)

    def copy(self, shard: Shard, name: str) -> None:
        """Write ``shard`` under ``name``, byte for byte."""
        with (
            _open(shard.path) as source,
            (self._folder / name).open("xb", buffering=0) as target,
        ):
            _write(target, source.read(shard.header_size))
            for tensor in shard.tensors:
                for values in self._read(tensor, source):
                    self._look_at(tensor.name, values)
                    _write(target, _raw(values))

    def write(self, pieces: Sequence[Piece], name: str) -> None:
        """Write ``pieces`` as a shard, each cast to its dtype."""
        with (self._folder / name).open("xb", buffering=0) as target:
            _write(target, _header(pieces))
            for piece in pieces:
                if piece.values is not None:
                    cast = piece.values.to(piece.dtype)
                    self._look_at(piece.name, cast)
                    _write(target, _raw(cast))
                    self._on_bytes(0 if piece.source is None else piece.source.size)
                    continue
                if piece.source is None:
                    filled = torch.full(piece.shape, piece.fill, dtype=piece.dtype)
                    _write(target, _raw(filled))
                    continue
                with _open(piece.source.shard) as source:
                    for values in self._read(piece.source, source):
                        cast = values.to(piece.dtype)
                        self._look_at(piece.name, cast)
                        _write(target, _raw(cast))

    def _read(self, tensor: StoredTensor, source: IO[bytes]) -> Iterator[torch.Tensor]:
        """The tensor's values, flat, a chunk at a time: each is overwritten by the next."""
        source.seek(tensor.start)
        left = tensor.size
        while left:
            chunk = self._buffer[: min(CHUNK_BYTES, left)]
            _read_into(source, chunk, tensor)
            yield chunk.view(DTYPES[tensor.dtype])
            left -= len(chunk)
            self._on_bytes(len(chunk))

    def _look_at(self, name: str, values: torch.Tensor) -> None:
        if not values.is_floating_point():
            return
        # the cheapest pass there is; a sum that only overflows is cleared by the count
        if not math.isfinite(values.sum().item()) and (
            count := int((~torch.isfinite(values)).sum())
        ):
            self.non_finite[name] += count


def _header(pieces: Sequence[Piece]) -> bytes:
    """A safetensors header: its length in 8 bytes, then JSON padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.size
        entries[piece.name] = {
            "dtype": STORED_NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: torch.Tensor) -> memoryview:
    data: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(data)


def _write(target: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]


def _open(shard: Path) -> IO[bytes]:
    with reads(shard):
        return shard.open("rb", buffering=0)


def _read_into(source: IO[bytes], chunk: torch.Tensor, tensor: StoredTensor) -> None:
    view = _raw(chunk)
    while view:
        with reads(tensor.shard):
            read = source.readinto(view)  # type: ignore[attr-defined]
        if not read:
            raise UnreadableInput(
                f"{tensor.shard} became shorter while {printable(tensor.name)} was read"
            )
        view = view[read:]
