"""A data file is read as what it is: the right texts of each format, by ending and by content."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hysparse_cli.texts.documents import read_documents
from tests.texts.documents.samples import COMPRESS, PLAIN, TEXTS, jsonl, parquet, table

RECORDS = [{"text": text} for text in TEXTS]
LINES, LIST = jsonl(TEXTS), json.dumps(RECORDS).encode()
INDENTED = json.dumps(RECORDS, indent=2).encode()
JQ = "\n".join(json.dumps(record, indent=2, ensure_ascii=False) for record in RECORDS).encode()
MARK = b"\xef\xbb\xbf"


def read(path: Path, content: bytes, field: str = "text") -> list[str]:
    path.write_bytes(content)
    return list(read_documents(path, field))


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.jsonl", LINES, TEXTS),
        ("a.NDJSON", LINES, TEXTS),
        ("a.JSONL", LINES.rstrip(b"\n"), TEXTS),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n"), TEXTS),
        ("a.jsonl", LINES.replace(b"\n", b"\r"), TEXTS),
        ("a.jsonl", b"\n\n" + LINES.replace(b"\n", b"\n\n \n"), TEXTS),
        ("a.jsonl", MARK + LINES, TEXTS),
        ("a.jsonl", MARK + LINES + MARK + LINES, TEXTS + TEXTS),
        ("a.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
        ("a.jsonl", LIST, TEXTS),
        ("a.jsonl", INDENTED, TEXTS),
        ("a.jsonl", JQ, TEXTS),
        ("a.jsonl", b'{"text": null}\n{"text": " \\n"}\n{"text": ""}\n{"text": "b"}\n', ["b"]),
        ("a.jsonl", b'{"n": NaN, "text": "a"}', ["a"]),
        ("a.json", LIST, TEXTS),
        ("a.Json", INDENTED, TEXTS),
        ("a.json", MARK + INDENTED.replace(b"\n", b"\r\n"), TEXTS),
        ("a.json", LINES, TEXTS),
        ("a.json", JQ, TEXTS),
        ("a.json", b'{"text":\n "a"}', ["a"]),
        ("a.json", b'{"text": "a"}', ["a"]),
        ("a.json", b"[]", []),
        ("a.json", b'[{"n": ' + b"9" * 5000 + b', "text": "a"}]', ["a"]),
        ("a.csv", table(TEXTS), TEXTS),
        ("a.CSV", MARK + table(TEXTS), TEXTS),
        ("a.csv", b'text\r\n"a\r\nb"\r\n\r\nc', ["a\r\nb", "c"]),
        ("a.csv", b"text\ra\rb\r", ["a", "b"]),
        ("a.csv", b"n,n,text\n1,2,a\n", ["a"]),
        ("a.csv", b'text\n"' + b"x" * 200_000 + b'"\n', ["x" * 200_000]),
        ("a.csv", "text\na\u2028b\n".encode(), ["a\u2028b"]),
        ("a.tsv", table(TEXTS, "\t"), TEXTS),
        ("a.parquet", parquet, TEXTS),
        ("a.PARQUET", parquet, TEXTS),
        ("a.txt", PLAIN.encode(), [PLAIN]),
        ("a.MD", PLAIN.encode(), [PLAIN]),
        ("a.txt", MARK + PLAIN.encode(), [PLAIN]),
        ("a.txt", PLAIN.replace("\n", "\r\n").encode(), [PLAIN]),
        ("a.txt", PLAIN.replace("\n", "\r").encode(), [PLAIN]),
        ("a.txt", "a\u2028b\x0cc\x85d".encode(), ["a\u2028b\x0cc\x85d"]),
        ("a.txt", b"", []),
        ("a.txt", MARK, []),
        ("a.txt", b" \n\t\r\n", []),
        ("a.jsonl", b"", []),
        ("a.json", b" \n", []),
        ("a.csv", b"", []),
        ("a.csv", b"text\n", []),
        ("a", LINES, TEXTS),
        ("a", MARK + LINES, TEXTS),
        ("a", INDENTED, TEXTS),
        ("a", JQ, TEXTS),
        ("a", table(TEXTS), TEXTS),
        ("a", table(TEXTS, "\t"), TEXTS),
        ("a", parquet, TEXTS),
        ("a", PLAIN.encode(), [PLAIN]),
        ("a", b"[Illustration]\n\nCall me Ishmael.\n", ["[Illustration]\n\nCall me Ishmael.\n"]),
        ("a", b"PAR1S IS A CITY", ["PAR1S IS A CITY"]),
        ("a", b"Once upon a time, there was\n", ["Once upon a time, there was\n"]),
        ("a", b"", []),
    ],
)
def test_each_format_gives_its_texts(
    tmp_path: Path, name: str, content: bytes | Callable[[list[str]], bytes], texts: list[str]
) -> None:
    raw = content if isinstance(content, bytes) else content(TEXTS)
    assert read(tmp_path / name, raw) == texts


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_give_the_same_whatever_their_name(tmp_path: Path, ending: str) -> None:
    pack = COMPRESS[ending]
    for name in (f"a.jsonl.{ending}", f"a.JSONL.{ending.upper()}", "a.jsonl", "a", f"a.{ending}"):
        assert read(tmp_path / name, pack(LINES)) == TEXTS, name
    assert read(tmp_path / f"a.jsonl.{ending}", pack(LINES) + pack(LINES)) == TEXTS + TEXTS
    assert read(tmp_path / f"a.csv.{ending}", pack(table(TEXTS))) == TEXTS
    assert read(tmp_path / f"a.json.{ending}", pack(INDENTED)) == TEXTS
    assert read(tmp_path / f"a.txt.{ending}", pack(PLAIN.encode())) == [PLAIN]
    assert read(tmp_path / f"a.txt.{ending}", pack(b"")) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_the_field_may_have_another_name(tmp_path: Path, name: str) -> None:
    write: dict[str, Callable[[], bytes]] = {
        "a.jsonl": lambda: jsonl(TEXTS, "Body text"),
        "a.csv": lambda: table(TEXTS, ",", "Body text"),
        "a.tsv": lambda: table(TEXTS, "\t", "Body text"),
        "a.parquet": lambda: parquet(TEXTS, "Body text"),
    }
    assert read(tmp_path / name, write[name](), "Body text") == TEXTS


def test_a_long_list_is_read_in_little_memory(tmp_path: Path) -> None:
    texts = [f"{n} " + "x" * (n % 7) * 1000 for n in range(3000)]
    content = json.dumps([{"text": text, "deep": [[{}]] * (n % 5)} for n, text in enumerate(texts)])
    assert read(tmp_path / "a.json", content.encode()) == texts


def test_a_file_through_a_link_or_an_open_descriptor_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(LINES))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a")
    assert list(read_documents(tmp_path / "link.jsonl")) == TEXTS
    with (tmp_path / "a").open("rb") as file:
        assert list(read_documents(Path(f"/proc/self/fd/{file.fileno()}"))) == TEXTS


def test_reading_ends_soon_after_the_characters_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * (5 << 20))
    assert [len(text) for text in read_documents(path, most_characters=2_000_000)] == [2 << 20]
    path.with_suffix(".jsonl").write_bytes(LINES)
    assert list(read_documents(path.with_suffix(".jsonl"), most_characters=9)) == TEXTS[:2]


def test_reading_tells_how_much_is_read(tmp_path: Path) -> None:
    texts = ["".join(random.Random(n).choices("abcdefgh", k=20_000)) for n in range(200)]
    for name, content in (("a.jsonl", jsonl(texts)), ("a.parquet", parquet(texts))):
        path, told = tmp_path / name, list[tuple[int, int]]()
        path.write_bytes(content)
        for _ in read_documents(path, on_read=lambda *at, told=told: told.append(at)):
            pass
        size = os.path.getsize(path)
        assert len(told) > 3 and told[-1] == (size, size)
