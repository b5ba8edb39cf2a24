"""Small data files of every format, and what is in them."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from functools import partial

import pytest

TEXTS = ["one, two", "zwei ä 😀", 'she said "no"\nand left']
PLAIN = "first line\nsecond ä\n"


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"n": 1, field: text}) + "\n" for text in texts).encode()


def table(texts: list[str], separator: str = ",", field: str = "text") -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator).writerows([["n", field], *([1, text] for text in texts)])
    return file.getvalue().encode()


def parquet(texts: list[str], field: str = "text") -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    write_table = pytest.importorskip("pyarrow.parquet").write_table
    file = io.BytesIO()
    write_table(pyarrow.table({"n": [1] * len(texts), field: texts}), file, row_group_size=2)
    return file.getvalue()


def zst(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue().to_pybytes())


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": partial(gzip.compress, mtime=0),
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zst,
}
