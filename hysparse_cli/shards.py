"""Writing safetensors shards as a stream: a chunk in memory at a time, never a shard.

A shard is a header and tensors. Unless a dtype is asked for, bytes go over as they are; on the way
every source byte is hashed and every float looked at once for NaN and infinity.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from hysparse_cli.checkpoint import Shard, StoredTensor
from hysparse_cli.errors import UnreadableInput
from hysparse_cli.staging import sync

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
CHUNK_BYTES = 4 << 20
MAX_RUNNING = 8
_ALIGNMENT = 8

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: one that lies in a source shard, or one of a constant ``fill``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: StoredTensor | None = None
    fill: float = 0.0

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


@dataclass
class ShardWriter:
    """Streams shards into a folder; ``hashes`` and ``non_finite`` say what was seen on the way.

    Use it as a context manager: leaving it waits until every shard is on the disk.
    """

    folder: Path
    on_bytes: OnBytes
    hashes: dict[str, str] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> "ShardWriter":
        self._hasher = ThreadPoolExecutor(1, "hash")
        self._checker = ThreadPoolExecutor(1, "check")
        self._syncer = ThreadPoolExecutor(1, "sync")
        self._running: deque[Future[None]] = deque()
        self._synced: list[Future[None]] = []
        self._digests: dict[Path, Any] = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pool in (self._hasher, self._checker, self._syncer):
            pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for work in (*self._running, *self._synced):
                work.result()
            self.hashes.update({p.name: digest.hexdigest() for p, digest in self._digests.items()})

    def copy(self, shard: Shard, name: str) -> None:
        """Write ``shard`` under ``name``, byte for byte."""
        with shard.path.open("rb", buffering=0) as source, self._new_file(name) as target:
            target.write(self._source_header(shard, source))
            for tensor in shard.tensors:
                dtype = DTYPES[tensor.dtype]
                for chunk in self._chunks(tensor, source):
                    self._look_at(tensor.name, torch.frombuffer(chunk, dtype=dtype))
                    target.write(chunk)

    def write(self, pieces: Sequence[Piece], name: str) -> None:
        """Write ``pieces`` as a shard, each cast to its dtype."""
        with self._new_file(name) as target:
            target.write(_header(pieces))
            for piece in pieces:
                if piece.source is None:
                    target.write(_raw(torch.full(piece.shape, piece.fill, dtype=piece.dtype)))
                    continue
                dtype = DTYPES[piece.source.dtype]
                with piece.source.shard.open("rb", buffering=0) as source:
                    for chunk in self._chunks(piece.source, source):
                        values = torch.frombuffer(chunk, dtype=dtype).to(piece.dtype)
                        self._look_at(piece.name, values)
                        target.write(_raw(values))

    def hash_header(self, shard: Shard) -> None:
        """Begin the hash of a source shard whose tensors ``write`` is about to read in order."""
        with shard.path.open("rb", buffering=0) as source:
            self._source_header(shard, source)

    def _source_header(self, shard: Shard, source: IO[bytes]) -> bytes:
        header = source.read(shard.header_size)
        self._digests[shard.path] = hashlib.sha256(header)
        return header

    def _chunks(self, tensor: StoredTensor, source: IO[bytes]) -> Iterator[bytearray]:
        source.seek(tensor.start)
        left = tensor.size
        digest = self._digests[tensor.shard]
        while left:
            chunk = bytearray(min(CHUNK_BYTES, left))
            _read_into(source, chunk, tensor)
            self._later(self._hasher, digest.update, chunk)
            yield chunk
            left -= len(chunk)
            self.on_bytes(len(chunk))

    def _later(self, pool: ThreadPoolExecutor, work: Callable[..., None], *args: Any) -> None:
        """Hand work to a thread, and wait for the oldest where too many chunks are held."""
        self._running.append(pool.submit(work, *args))
        if len(self._running) > MAX_RUNNING:
            self._running.popleft().result()

    def _look_at(self, name: str, values: torch.Tensor) -> None:
        """Count NaN and infinity among the values as written, on a thread of its own."""
        if values.is_floating_point():
            self._later(self._checker, self._count, name, values)

    def _count(self, name: str, values: torch.Tensor) -> None:
        low, high = torch.aminmax(values)  # both are NaN where any value is
        if not (torch.isfinite(low) and torch.isfinite(high)):
            count = int((~torch.isfinite(values)).sum())
            self.non_finite[name] = self.non_finite.get(name, 0) + count

    @contextmanager
    def _new_file(self, name: str) -> Iterator[IO[bytes]]:
        with (self.folder / name).open("xb", buffering=0) as file:
            yield file
        self._synced.append(self._syncer.submit(sync, self.folder / name))


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


def _read_into(source: IO[bytes], chunk: bytearray, tensor: StoredTensor) -> None:
    view, got = memoryview(chunk), 0
    while got < len(chunk):
        read = source.readinto(view[got:])  # type: ignore[attr-defined]
        if not read:
            raise UnreadableInput(f"{tensor.shard} became shorter while {tensor.name} was read")
        got += read
