"""Rows on disk while a sweep runs: whole ones are kept when it is stopped, and not done again."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hysparse_cli.bench.rows import Row
from hysparse_cli.errors import InvalidRecipe, UnreadableInput, reads, writes
from hysparse_cli.files.reading import parse_json

NAME = "rows.jsonl"


class Kept:
    """``rows.jsonl`` of an output folder, or nothing without a folder.

    Its first line is the stamp: what the rows were measured with.

    Raises: InvalidRecipe where its rows were measured with something else; UnreadableInput where
        they are no rows or can't be read; OutOfResources where they can't be written.
    """

    def __init__(self, folder: Path | None, stamp: dict[str, Any]):
        self.path = None if folder is None else folder / NAME
        self.rows: list[Row] = []
        self.found: dict[str, Any] = {}
        stamp = json.loads(json.dumps(stamp))
        if lines := self._read():
            before = lines[0]["stamp"]
            if other := [n for n, value in stamp.items() if before.get(n) != value]:
                raise InvalidRecipe(
                    f"{self.path} holds rows that were measured with another {', '.join(other)}: "
                    "give another --output, or remove that file"
                )
            try:
                for line in lines[1:]:
                    self.rows += [Row(**row) for row in line.pop("rows", [])]
                    self.found |= line
            except TypeError:
                raise self._not_ours() from None
        elif self.path is not None:
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
        with writes(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; one that was being written when the sweep was stopped is cut off."""
        if self.path is None or not self.path.exists():
            return []
        with reads(self.path):
            content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [parse_json(line, str(self.path)) for line in whole.splitlines()]
        except UnreadableInput:
            raise self._not_ours() from None
        ours = [line for line in lines if isinstance(line, dict)]
        if ours != lines or (ours and not isinstance(ours[0].get("stamp"), dict)):
            raise self._not_ours()
        if whole != content:
            with writes(self.path):
                os.truncate(self.path, len(whole))
        return ours

    def _not_ours(self) -> UnreadableInput:
        return UnreadableInput(
            f"{self.path} is not what hysparse bench wrote: give another --output, or remove that "
            "file"
        )
