"""Rows on disk while a sweep runs: whole ones are kept when it is stopped, and not done again."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hysparse_cli.bench.rows import Row
from hysparse_cli.errors import InvalidRecipe, OutOfResources, UnreadableInput

NAME = "rows.jsonl"


class Kept:
    """``rows.jsonl`` of an output folder, or nothing without a folder.

    Its first line is the stamp: what the rows were measured with.

    Raises: InvalidRecipe where the folder is a file, or its rows were measured with something else;
        UnreadableInput where they are no rows; OutOfResources where they can't be read or written.
    """

    def __init__(self, folder: Path | None, stamp: dict[str, Any]):
        self.path = None if folder is None else folder / NAME
        self.rows: list[Row] = []
        self.found: dict[str, Any] = {}
        stamp = json.loads(json.dumps(stamp))
        with writes_to(folder):
            lines = self._read()
        if lines:
            before = lines[0]["stamp"]
            if other := [n for n, value in stamp.items() if before.get(n) != value]:
                raise InvalidRecipe(
                    f"{self.path} holds rows that were measured with another {', '.join(other)}: "
                    "give another --output, or remove that file"
                )
            for line in lines[1:]:
                self.rows += [Row(**row) for row in line.pop("rows", [])]
                self.found |= line
        elif self.path is not None:
            with writes_to(folder):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text("")
            self._append({"stamp": stamp})

    def add(self, rows: list[Row]) -> None:
        """All rows of a cell at once."""
        self.rows += rows
        self._append({"rows": [asdict(row) for row in rows]})

    def find(self, name: str, value: Any) -> None:
        """Keep what else was measured, such as the ceilings."""
        self.found[name] = value
        self._append({name: value})

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        with writes_to(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; one that was being written when the sweep was stopped is cut off."""
        if self.path is None or not self.path.exists():
            return []
        text = self.path.read_text(errors="replace")
        whole = text[: text.rfind("\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            lines = [None]
        ours = [line for line in lines if isinstance(line, dict)]
        if ours != lines or (ours and "stamp" not in ours[0]):
            raise UnreadableInput(
                f"{self.path} is not what hysparse bench wrote: give another --output, or remove "
                "that file"
            )
        if whole != text:
            self.path.write_text(whole)
        return ours


@contextmanager
def writes_to(place: Path | None) -> Iterator[None]:
    """Raises: InvalidRecipe where ``place`` is a file and no folder; OutOfResources where it can't
    be written."""
    try:
        yield
    except FileExistsError:
        raise InvalidRecipe(f"output {place} is a file: give a folder") from None
    except OSError as error:
        raise OutOfResources(f"output {place}: {error.strerror or error}") from None
