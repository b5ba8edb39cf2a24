"""Opens a data file as what it is: by its ending, and by its content where it has none."""

import bz2
import csv
import gzip
import io
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from hysparse_cli.errors import InvalidRecipe, UnreadableInput, from_system, reads
from hysparse_cli.printable import printable, single_line
from hysparse_cli.texts.documents.json_rows import line_by_line

Kind = Literal["jsonl", "json", "csv", "tsv", "parquet", "text"]
OnRead = Callable[[int, int], None]

KINDS: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_MAGIC = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ".zst": re.compile(rb"\(\xb5/\xfd|[P-_]\*M\x18"),
}
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"
_JSON = re.compile(r'\s*(\{\s*("|\})|\[\s*(\{|\]))')
_HEAD_BYTES, _BUFFER_BYTES = 1 << 16, 1 << 20


@contextmanager
def data_file(path: Path, text_field: str, on_read: OnRead) -> Iterator[tuple[Kind, BinaryIO]]:
    """What ``path`` holds, and its bytes, decompressed.

    Compressed content is known by its first bytes, whatever the name.

    Args:
        text_field: tells a table without an ending from text, by its first line.
    Raises: UnreadableInput where it can't be read, there or later; InvalidRecipe where a package
        that reads it is not installed.
    """
    check_file(path)
    with readable(path):
        with _opened(path) as file:
            packing = _packing(path, file.read(16))
        with _opened(path, packing) as file:
            kind = _kind(path, file.read(_HEAD_BYTES), packing, text_field)
        with _opened(path, packing, on_read) as file:
            yield kind, file


def check_file(path: Path) -> None:
    """Raises: UnreadableInput where ``path`` is no file that can be read more than once."""
    with reads(path):
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise UnreadableInput(f"data {path} is a folder: give one file")
    if not stat.S_ISREG(mode):
        raise UnreadableInput(
            f"data {path} is a pipe or a device, and data is read more than once: save it as a "
            "file first"
        )


def decoded(file: BinaryIO, newline: str | None = None) -> TextIO:
    """UTF-8 text, without a byte-order mark; a byte that is no UTF-8 is a lone surrogate."""
    return io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)


class _Told(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, on_read: OnRead):
        super().__init__(path)
        self._on_read, self._total = on_read, path.stat().st_size

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self._on_read(self.tell(), self._total)
        return count


@contextmanager
def _opened(
    path: Path, packing: str | None = None, on_read: OnRead = lambda done, total: None
) -> Iterator[BinaryIO]:
    with ExitStack() as stack:
        raw = stack.enter_context(io.BufferedReader(_Told(path, on_read), _BUFFER_BYTES))
        file: Any = raw
        if packing is not None:
            unpacked = stack.enter_context(_unpacked(path, raw, packing))
            file = stack.enter_context(io.BufferedReader(unpacked, _BUFFER_BYTES))
        yield file


def _unpacked(path: Path, raw: BinaryIO, packing: str) -> Any:
    if packing == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if packing == ".xz":
        return lzma.LZMAFile(raw)
    if packing == ".bz2":
        return bz2.BZ2File(raw)
    try:
        from pyarrow import CompressedInputStream
    except ImportError:
        raise InvalidRecipe(
            f"data {path} is compressed by zstd, which needs the package pyarrow: pip install "
            "'hysparse[data]'"
        ) from None
    return CompressedInputStream(raw, "zstd")


def _packing(path: Path, head: bytes) -> str | None:
    for ending, magic in _MAGIC.items():
        if magic.match(head):
            return ending
    named = path.suffix.lower()
    if named in COMPRESSED and head:
        raise UnreadableInput(
            f"data {path} is not compressed, or damaged, though its name ends in {named}: copy or "
            "download it again, or rename it to what it is"
        )
    return None


def _kind(path: Path, head: bytes, packing: str | None, text_field: str) -> Kind:
    """What the first bytes, decompressed, and the ending say."""
    if packing is not None and any(magic.match(head) for magic in _MAGIC.values()):
        raise UnreadableInput(f"data {path} is compressed twice: decompress it once")
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    ending = inner.suffix.lower()
    if ending and ending not in KINDS:
        raise UnreadableInput(
            f"data {path} ends in {printable(inner.suffix, 40)}, which is not read: give "
            f"{', '.join(KINDS)}, also as {', '.join(COMPRESSED)}; rename it where it is one of "
            "them"
        )
    text = head.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "replace")
    kind = KINDS[ending] if ending else _by_content(head, text, text_field)
    if kind == "parquet" and packing is not None:
        raise UnreadableInput(f"data {path} is a compressed parquet file: decompress it first")
    if kind != "parquet" and head.startswith(_WIDE):
        raise UnreadableInput(
            f"data {path} is UTF-16 text (Windows calls it Unicode): save it as UTF-8"
        )
    return "jsonl" if kind == "json" and line_by_line(text) else kind


def _by_content(head: bytes, text: str, text_field: str) -> Kind:
    if head.startswith(_PARQUET) and b"\0" in head:
        return "parquet"
    if _JSON.match(text):
        return "json"
    first_line = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    tables: dict[str, Kind] = {",": "csv", "\t": "tsv"}
    for separator, kind in tables.items():
        if separator in first_line:
            cells = next(csv.reader([first_line], delimiter=separator), [])
            if text_field in cells:
                return kind
    return "text"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Let what a file's system or its decompressor refuses be an UnreadableInput."""
    try:
        yield
    except (lzma.LZMAError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None:  # a decompressor's
            raise _damaged(path, error) from None
        raise from_system(error, path, writing=False) from error


def _damaged(path: Path, error: Exception) -> UnreadableInput:
    return UnreadableInput(
        f"data {path} is corrupt: {single_line(error)}; copy or download it again"
    )
