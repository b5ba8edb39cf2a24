import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from hysparse_cli.documents import read_documents
from hysparse_cli.errors import UnreadableInput

LINES = (
    '{"text": "one", "body": "1"}\n\n{"text": "", "body": "x"}\n{"text": "zwei ä", "body": "2"}\n'
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz", "a.ndjson"])
def test_json_lines_compressed_or_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    raw = LINES.encode()
    pack: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.compress, ".gz": gzip.compress}
    path.write_bytes(pack.get(path.suffix, bytes)(raw))
    assert list(read_documents(path)) == ["one", "zwei ä"]
    assert list(read_documents(path, "body")) == ["1", "x", "2"]


@pytest.mark.parametrize("name", ["a.txt", "a", "a.txt.xz"])
def test_plain_text_is_one_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    raw = b"first line\nsecond line\n"
    path.write_bytes(lzma.compress(raw) if path.suffix == ".xz" else raw)
    assert list(read_documents(path)) == ["first line\nsecond line\n"]


def test_long_plain_text_comes_in_pieces_that_end_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    text = "".join(f"line {i}\n" for i in range(300_000))
    path.write_text(text)
    pieces = list(read_documents(path))
    assert len(pieces) > 2
    assert all(piece.endswith("\n") for piece in pieces)
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            r"a\.jsonl, line 2 has no field 'text'.*'body'",
        ),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", r"line 1 has no field 'text' \(it has: none\)"),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: field 'text' holds a int, not text"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt is not UTF-8 text"),
        ("a.jsonl.xz", b"not xz", r"a\.jsonl\.xz is corrupt"),
        ("a.jsonl.xz", lzma.compress(LINES.encode())[:-20], r"a\.jsonl\.xz is corrupt"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], r"a\.jsonl\.gz is corrupt"),
        ("a.jsonl.gz", b"not gz", r"a\.jsonl\.gz is corrupt"),
    ],
)
def test_bad_files_are_named_with_the_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UnreadableInput, match=message):
        list(read_documents(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableInput, match=r"nowhere\.txt: No such file"):
        list(read_documents(tmp_path / "nowhere.txt"))
