"""Keeps what a run has finished as lines of JSON, so that a stopped run goes on from there."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hysparse_cli.errors import InvalidRecipe, UnreadableInput, reads, writes
from hysparse_cli.files.reading import parse_json

Line = dict[str, Any]


class Journal:
    """A file of JSON objects, a line each, which only grows.

    A line that a killed run left unfinished is cut off.

    Args:
        path: None keeps nothing.
        command: the command that writes it, for messages.
        take: is given each line that is there; a KeyError or TypeError from it says that the line
            is not what ``command`` wrote.
        stamp: what all lines depend on, kept as the first line; None where each line says so
            itself.
    Raises: InvalidRecipe where the file has another stamp; UnreadableInput where it is not what
        ``command`` wrote or can't be read; OutOfResources where it can't be written.
    """

    def __init__(
        self,
        path: Path | None,
        command: str,
        take: Callable[[Line], None],
        stamp: Mapping[str, Any] | None = None,
    ):
        self.path, self._command = path, command
        if path is None:
            return
        with reads(path):
            content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                entry = _object(parse_json(line, str(path)))
                if number == 1 and stamp is not None:
                    self._check(entry["stamp"], stamp)
                else:
                    take(entry)
            except (UnreadableInput, KeyError, TypeError):
                raise UnreadableInput(
                    f"{path}, line {number} is not what hysparse {command} wrote: give another "
                    "--output, or remove the file to measure again"
                ) from None
        if whole != content:
            with writes(path):
                os.truncate(path, len(whole))
        if stamp is not None and not whole:
            self.append({"stamp": stamp})

    def append(self, line: Mapping[str, Any]) -> None:
        """Add ``line``: once this returns, it stays whatever happens.

        Raises: OutOfResources where it can't be written.
        """
        if self.path is None:
            return
        with writes(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _check(self, before: Any, stamp: Mapping[str, Any]) -> None:
        now, before = json.loads(json.dumps(stamp)), _object(before)
        if other := [name for name, value in now.items() if before.get(name) != value]:
            raise InvalidRecipe(
                f"{self.path} holds rows that were measured with another {', '.join(other)}: "
                "give another --output, or remove that file"
            )


def _object(found: Any) -> Line:
    if not isinstance(found, dict):
        raise TypeError(f"a {type(found).__name__} is no JSON object")
    return found
