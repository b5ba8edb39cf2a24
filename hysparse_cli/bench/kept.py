"""Rows on disk while a sweep runs: whole ones are kept when it is stopped, and not done again."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hysparse_cli.bench.rows import Row
from hysparse_cli.errors import InvalidRecipe, UnreadableInput

NAME = "rows.jsonl"


class Kept:
    """``rows.jsonl`` of an output folder, or nothing without a folder.

    Its first line is the stamp: what the rows were measured with.

    Raises: InvalidRecipe where the folder's rows were measured with something else.
    """

    def __init__(self, folder: Path | None, stamp: dict[str, Any]):
        self.path = None if folder is None else folder / NAME
        self.rows: list[Row] = []
        self.found: dict[str, Any] = {}
        stamp = json.loads(json.dumps(stamp))
        lines = self._read()
        if lines:
            before = lines[0].get("stamp", {})
            if other := [n for n, value in stamp.items() if before.get(n) != value]:
                raise InvalidRecipe(
                    f"{self.path} holds rows that were measured with another {', '.join(other)}: "
                    "give another --output, or remove that file"
                )
            for line in lines[1:]:
                if "rows" in line:
                    self.rows += [Row(**row) for row in line["rows"]]
                else:
                    self.found |= line
        elif self.path is not None:
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
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; one that was being written when the sweep was stopped is cut off."""
        if self.path is None or not self.path.exists():
            return []
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole)
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise UnreadableInput(f"{self.path} is no list of rows: {error}") from None
