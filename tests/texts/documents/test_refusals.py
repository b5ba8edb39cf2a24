"""What can't be read as text is refused in a line: where, what it holds, what to do."""

import os
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.texts.documents import BadRows, read_documents
from hysparse_cli.texts.documents.rows import MOST_CHARACTERS
from tests.texts.documents.samples import COMPRESS, PLAIN, TEXTS, jsonl, parquet

GOOD = b'{"text": "good"}\n'
LIST = b'[{"text": "good"}, '


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (name, content, message)
        for name in (
            "a.docx",
            "a.pdf",
            "a.zip",
            "a.jsonl.zip",
            "a.2024",
            "a.html",
            "a.yaml",
            "a.gz.x",
        )
        for content, message in [
            (GOOD, rf"{name} ends in \.\w+, which is not read: .*\.jsonl.*\.zst")
        ]
    ],
)
def test_other_endings_are_refused_with_the_list(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    refused(tmp_path / name, content, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b"not json\n", r"a\.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", GOOD + b'{"text": "cut', r"line 2 is not valid JSON"),
        ("a.jsonl", GOOD + b"\n[1]\n", r"line 3 holds a list, where each row must hold named"),
        ("a.jsonl", GOOD + b"5\n", r"line 2 holds a number \(5\)"),
        ("a.jsonl", GOOD + b"null\n", r"line 2 holds nothing"),
        ("a.jsonl", GOOD + b'"words"\n', r"line 2 holds a str"),
        ("a.jsonl", GOOD + b'{"text": 5}\n', r"line 2: field 'text' holds a number \(5\), not"),
        ("a.jsonl", GOOD + b'{"text": true}\n', r"holds true or false \(True\), not text"),
        ("a.jsonl", GOOD + b'{"text": ["a"]}\n', r"holds a list, not text: name another field"),
        ("a.jsonl", GOOD + b'{"Text": "a"}\n', r"no field 'text' \(it has: 'Text'\).*text_field"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', r"no field 'text' .*'messages'"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n', r"'prompt', 'completion'"),
        ("a.jsonl", b"{}\n", r"line 1 has no field 'text' \(it has: none\)"),
        ("a.jsonl", b'{"\\u001b[31m\\n": 1}\n', r"it has: '\\x1b\[31m\\n'"),
        (
            "a.jsonl",
            GOOD + b'{"text": "a\\ud83d"}\n',
            r"line 2.* half a character \(\\ud83d\).* 2: ",
        ),
        ("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n', r"line 2.*not UTF-8 text \(0xe9\).*save"),
        ("a.jsonl", GOOD + b'{"n": ' + b"9" * 5000 + b"}\n", r"line 2 is not valid JSON: Exceeds"),
        ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", r"line 2 is nested too deeply"),
        ("a.jsonl", PLAIN.encode(), r"line 1 is not valid JSON"),
        ("a.jsonl", b"\xff\xfe" + GOOD.decode().encode("utf-16-le"), r"UTF-16.*save it as UTF-8"),
        ("a.txt", b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), r"UTF-16.*save it as UTF-8"),
        ("a.csv", b"\xff\xfe" + b"a\0b\0", r"UTF-16"),
        ("a", PLAIN.encode("utf-16"), r"UTF-16"),
        ("a.txt", PLAIN.encode("utf-16-le"), r"line 1 holds binary data \(a NUL byte\)"),
        ("a", b"text\n\x7fELF\0\0", r"a, line 2 holds binary data"),
        ("a.txt", b"one\ncaf\xe9\n", r"line 2 holds a byte that is not UTF-8 text \(0xe9\): save"),
        ("a.txt", b"\xef\xbb\xbf" + b"a\n" * (1 << 20) + b"\x80", r"line 1,048,577 holds a byte"),
        ("a.json", LIST + b'{"text": 5}]', r"record 2 \(line 1\): field 'text' holds a number"),
        ("a.json", b'[\n{"text": "a"},\n{"text": 1}\n]', r"record 2 \(line 3\)"),
        ("a.json", LIST + b'{"text": "cut', r"record 2 .* is not valid JSON: Unterminated"),
        (
            "a.json",
            LIST + b'\n{"text" "b"}]',
            r"record 2 \(line 2\) is not valid JSON: .* \(line 2\)",
        ),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"a comma is missing between two records"),
        ("a.json", b'[{"text": "a"}', r"ends within its list"),
        ("a.json", LIST, r"ends within its list of records: copy or download it again"),
        (
            "a.json",
            b'[{"text": "a"}]\n{"text": "b"}',
            r"line 1 holds a list",
        ),
        ("a.json", b'[\n{"text": "a"}]\n{"text": "b"}', r"line 3.*: something follows the end of"),
        ("a.json", b"[\n" + b"[" * 100_000, r"record 1 \(line 2\) is nested too deeply"),
        ("a.json", b"[\n 1, 2]", r"record 1 \(line 2\) holds a number \(1\)"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"no field 'text' \(it has: 'data'\)"),
        ("a.json", b'"words"', r"line 1 holds a str"),
        ("a.json", PLAIN.encode(), r"line 1 is not valid JSON"),
        ("a.csv", b"n,Text\n1,a\n", r"a\.csv, line 1 has no field 'text' \(it has: 'n', 'Text'\)"),
        ("a.csv", b"text,text\na,b\n", r"line 1 names 2 columns 'text': rename all but one"),
        ("a.csv", b"n;text\n1;a\n", r"'n;text'.*seem to be separated by ';'"),
        (
            "a.csv",
            b"n,text\n1,a\n2,b, c\n",
            r"line 3 has 3 columns, and the first line names 2: put",
        ),
        ("a.csv", b"n,text\n1\n", r"line 2 has 1 columns"),
        ("a.csv", b'text\n"a\nb"\n"c" d\n', r"line 4 is not a valid row: ',' expected after"),
        ("a.csv", b'text\n"a\nb\n', r"line 2 is not a valid row: unexpected end of data"),
        ("a.csv", b"text\ncaf\xe9\n", r"line 2: field 'text' holds a byte that is not UTF-8"),
        ("a.csv", b"text\na\0b\n", r"line 2 holds binary data"),
        ("a.tsv", b"n\tbody\n1\ta\n", r"no field 'text' \(it has: 'n', 'body'\)"),
        ("a.parquet", b"not parquet", r"a\.parquet is not a parquet file, or damaged"),
        ("a.parquet", b"", r"a\.parquet is not a parquet file"),
        ("a.parquet", lambda: parquet(TEXTS)[:-50], r"is not a parquet file, or damaged|corrupt"),
        ("a.parquet", lambda: parquet(TEXTS, "body"), r"row 1 has no field 'text' .*'n', 'body'"),
        ("a.txt", lambda: parquet(TEXTS), r"line \d+ holds"),
        ("a.parquet.gz", lambda: COMPRESS["gz"](parquet(TEXTS)), r"compressed parquet.*decompress"),
        ("a.gz", lambda: COMPRESS["gz"](parquet(TEXTS)), r"compressed parquet.*decompress"),
        ("a.txt.gz", COMPRESS["gz"](COMPRESS["xz"](b"a")), r"compressed twice: decompress it once"),
    ],
)
def test_what_is_not_text_is_refused(
    tmp_path: Path, name: str, content: bytes | Callable[[], bytes], message: str
) -> None:
    refused(tmp_path / name, content if isinstance(content, bytes) else content(), message)


@pytest.mark.parametrize("ending", COMPRESS)
def test_damaged_compression_is_refused(tmp_path: Path, ending: str) -> None:
    path, packed = tmp_path / f"a.jsonl.{ending}", COMPRESS[ending](jsonl(TEXTS * 5000))
    corrupt = rf"a\.jsonl\.{ending} is corrupt: .*download it again"
    refused(path, packed[:-8], corrupt)
    refused(path, packed[: len(packed) // 2], corrupt)
    refused(path, packed[:20], corrupt)
    text = COMPRESS[ending](random.Random(0).randbytes(3_000_000).hex().encode())
    refused(tmp_path / f"a.txt.{ending}", text[:-8], rf"a\.txt\.{ending} is corrupt: .*download")
    refused(path, GOOD, rf"is not compressed, or damaged, though its name ends in \.{ending}")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name, message in {
        "pipe.jsonl": r"pipe\.jsonl is a pipe or a device, and data is read more than once: save",
        "": r"is a folder: give one file",
        "nowhere.txt": r"nowhere\.txt: No such file",
        "loop": r"can't read .*loop: Too many levels",
        "x" * 5000: r"File name too long",
    }.items():
        with pytest.raises(UnreadableInput, match=message):
            list(read_documents(tmp_path / name))
    with pytest.raises(UnreadableInput, match="is a pipe or a device"):
        list(read_documents(Path("/dev/null")))


def test_rows_without_a_text_in_parquet_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    write_table = pytest.importorskip("pyarrow.parquet").write_table
    bad = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(struct.pack("<3i", 0, 1, 3)), pyarrow.py_buffer(b"a\xc3\x28")
    )
    columns = {
        "numbers": (pyarrow.array([1, 2]), r"row 1: field 'text' holds a number \(1\)"),
        "bytes": (pyarrow.array([b"a"]), r"row 1: field 'text' holds binary data, not text"),
        "lists": (pyarrow.array([["a"]]), r"row 1: field 'text' holds a list"),
        "no utf-8": (bad, r"row 2: field 'text' can't be read: 'utf-8' codec"),
    }
    for name, (column, message) in columns.items():
        write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        with pytest.raises(UnreadableInput, match=message):
            list(read_documents(tmp_path / f"{name}.parquet"))


def test_bad_rows_are_skipped_and_counted_where_asked_for(tmp_path: Path) -> None:
    lines = [
        b'{"text": "a"}',
        b"[1]",
        b'{"text": 5}',
        b"{cut",
        b'{"body": "b"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"text": "b"}',
        b'{"text": null}',
    ]
    found = skipped(tmp_path / "a.jsonl", b"\n".join(lines))
    assert found.count == 8 and "line 2 holds a list" in str(found.first)
    rows = b'n,text\n1,a\n2\n3,"x" y\n4,b,c\n5,\xff\n6,b\n'
    assert skipped(tmp_path / "a.csv", rows).count == 4
    values = b'[{"text": "a"}, 5, {"body": "x"}, {"text": "\\udc00"}, {"text": "b"}]'
    assert skipped(tmp_path / "a.json", values).count == 3


def test_a_row_that_is_too_long_is_refused_or_skipped_in_bounded_memory(
    tmp_path: Path,
) -> None:
    path, long = tmp_path / "a.jsonl", b"x" * (MOST_CHARACTERS + 1000)
    path.write_bytes(b'{"text": "a"}\n{"text": "' + long + b'"}\n{"text": "b"}')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableInput, match=r"line 2 is longer than the 33,554,432 characters"):
        list(read_documents(path))
    bad_rows = BadRows(skip=True)
    assert list(read_documents(path, bad_rows=bad_rows)) == ["a", "b"] and bad_rows.count == 1
    path.with_suffix(".json").write_bytes(b'[{"text": "a"},\n{"text": "' + long + b'"}]')
    with pytest.raises(UnreadableInput, match=r"record 2 \(line 2\) is longer than"):
        list(read_documents(path.with_suffix(".json")))
    path.with_suffix(".csv").write_bytes(b"text\n" + long)
    with pytest.raises(UnreadableInput, match=r"line 2 is longer than"):
        list(read_documents(path.with_suffix(".csv")))
    path.with_suffix(".csv").write_bytes(
        b'text\n"' + (b"x" * 4000 + b"\n") * (MOST_CHARACTERS // 4000)
    )
    with pytest.raises(UnreadableInput, match=r"line 2 is not a valid row: field larger"):
        list(read_documents(path.with_suffix(".csv")))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KB


def refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UnreadableInput, match=message) as refusal:
        list(read_documents(path))
    line = str(refusal.value)
    assert line.isprintable() and str(path) in line and len(line) < 1000


def skipped(path: Path, content: bytes) -> BadRows:
    """What was skipped of ``content``, of which "a" and "b" are left."""
    path.write_bytes(content)
    bad_rows = BadRows(skip=True)
    assert list(read_documents(path, bad_rows=bad_rows)) == ["a", "b"]
    return bad_rows
