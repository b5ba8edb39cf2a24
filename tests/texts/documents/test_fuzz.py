"""Damaged data files: whatever is in them, texts come out, or one line of why not."""

import json
import random
import resource
import sys
import time
from pathlib import Path

import pytest

from hysparse_cli.errors import HysparseError
from hysparse_cli.texts.documents import BadRows, read_documents
from tests.texts.documents.samples import COMPRESS, PLAIN, TEXTS, jsonl, parquet, table

FILES = {
    "jsonl": lambda: jsonl(TEXTS * 5),
    "json": lambda: json.dumps([{"text": t, "n": [1.5, None]} for t in TEXTS * 5]).encode(),
    "csv": lambda: table(TEXTS * 5),
    "tsv": lambda: table(TEXTS * 5, "\t"),
    "parquet": lambda: parquet(TEXTS * 5),
    "txt": lambda: PLAIN.encode() * 20,
}
SPLICES = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b'"',
    b"\\",
    b"\\ud800",
    b"[",
    b"{",
    b"}",
]
SPLICES += [b"\r", b"\n", b"\x1f\x8b\x08", b"PAR1", b"9" * 5000, b"[" * 20_000, b'{"a":' * 20_000]
SECONDS, KILOBYTES = 10, 1_000_000


def damaged(content: bytes, rng: random.Random) -> bytes:
    """``content`` with a few bytes turned, dropped, repeated or put in, or with an end cut off."""
    raw = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at = rng.randrange(len(raw) + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(raw):
            raw[at] = rng.randrange(256)
        elif how == 1:
            del raw[at : at + rng.choice([1, 2, 50])]
        elif how == 2:
            raw[at:at] = raw[at : at + rng.choice([1, 8, 200])]
        elif how == 3:
            raw[at:at] = rng.choice(SPLICES)
        elif rng.random() < 0.2:
            del raw[at:]
    return bytes(raw)


def try_files(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Read ``count`` damaged files; returns how many were read, read in part, and refused."""
    contents = {ending: write() for ending, write in FILES.items()}
    ended = {"read": 0, "in part": 0, "refused": 0}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        ending = rng.choice([*FILES])
        raw, name = contents[ending], f"a.{ending}"
        if rng.random() < 0.3:
            packing = rng.choice([*COMPRESS])
            inside = damaged(raw, rng) if rng.random() < 0.5 else raw
            raw, name = COMPRESS[packing](inside), f"{name}.{packing}"
        path = folder / rng.choice([name, name, name, "a", "a.jsonl", "a.txt"])
        path.write_bytes(damaged(raw, rng))
        begun = time.process_time()
        bad_rows = BadRows(skip=rng.random() < 0.5)
        texts: list[str] = []
        try:
            texts += read_documents(path, bad_rows=bad_rows)
            ended["in part" if bad_rows.count else "read"] += 1
        except HysparseError as error:
            ended["refused"] += 1
            line = str(error)
            assert error.exit_code == 7 and line.isprintable() and len(line) < 2000, (seed, number)
            assert str(path) in line, (seed, number, line)
        assert "".join(texts).encode() or not texts  # no lone surrogate is let through
        assert time.process_time() - begun < SECONDS, (seed, number)
        path.unlink()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < KILOBYTES
    return ended


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    ended = try_files(tmp_path, 600, seed=0)
    assert min(ended.values()) > 20, ended


@pytest.mark.long
def test_many_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    ended = try_files(tmp_path, 20_000, seed=1)
    sys.stderr.write(f"{ended}\n")
    assert min(ended.values()) > 500, ended
