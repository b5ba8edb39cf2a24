"""A journal keeps whole lines, cuts off one that a kill left unfinished, and knows its stamp."""

import json
from pathlib import Path
from typing import Any

import pytest

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.files.journal import Journal, Line

STAMP = {"options": {"seed": 0}, "torch": "2"}


def journal(path: Path | None, stamp: Any = None) -> tuple[Journal, list[Line]]:
    lines: list[Line] = []
    return Journal(path, "bench", lines.append, stamp), lines


def test_lines_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first, lines = journal(path, STAMP)
    first.append({"row": 1})
    first.append({"row": "a\rb\u2028c\nd"})
    again, lines = journal(path, STAMP)
    assert lines == [{"row": 1}, {"row": "a\rb\u2028c\nd"}]
    again.append({"row": 3})
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == [
        {"stamp": STAMP},
        *lines,
        {"row": 3},
    ]


@pytest.mark.parametrize("stamp", [None, STAMP])
def test_a_journal_cut_anywhere_keeps_its_whole_lines_and_grows_on(
    tmp_path: Path, stamp: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    written, _ = journal(path, stamp)
    for row in range(2):
        written.append({"row": row})
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        cut, lines = journal(path, stamp)
        whole = content[:length].count(b"\n") - (stamp is not None)
        assert lines == [{"row": row} for row in range(whole)]
        for row in range(len(lines), 2):
            cut.append({"row": row})
        assert path.read_bytes() == content


def test_another_stamp_is_refused_by_name(tmp_path: Path) -> None:
    journal(tmp_path / "rows.jsonl", STAMP)
    before = (tmp_path / "rows.jsonl").read_bytes()
    for other in (STAMP | {"torch": "3"}, STAMP | {"driver": "1"}):
        name = "torch" if "driver" not in other else "driver"
        with pytest.raises(InvalidRecipe, match=f"measured with another {name}: give another"):
            journal(tmp_path / "rows.jsonl", other)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", ["", "x", "[1]", "5", "null", '"text"', '{"row": 1', "\xff"])
@pytest.mark.parametrize("stamp", [None, STAMP])
def test_a_line_of_something_else_is_named(tmp_path: Path, line: str, stamp: Any) -> None:
    path = tmp_path / "rows.jsonl"
    written, _ = journal(path, stamp)
    written.append({"row": 1})
    content = path.read_bytes()
    number = content.count(b"\n") + 1
    path.write_bytes(content + line.encode("latin-1") + b"\n" + b'{"half')
    with pytest.raises(UnreadableInput, match=f"line {number} is not what hysparse bench wrote"):
        journal(path, stamp)
    assert path.read_bytes().endswith(b"half")  # nothing is cut from what is not ours
    path.write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(UnreadableInput, match="line 1 is not what"):
        journal(path, stamp)


def test_without_a_path_nothing_is_kept() -> None:
    nowhere, lines = journal(None, STAMP)
    nowhere.append({"row": 1})
    assert lines == [] and nowhere.path is None
