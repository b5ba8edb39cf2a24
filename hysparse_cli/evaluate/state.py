"""What an evaluation has finished, on disk as it goes, so that a stopped one goes on from there."""

import json
import os
from pathlib import Path
from typing import Any

from hysparse_cli.errors import UnreadableInput, reads, writes
from hysparse_cli.files.output import prepare_results, sync, write_whole
from hysparse_cli.files.reading import parse_json

Key = dict[str, Any]
Found = dict[str, Any]

FINISHED, RESULT = "finished.jsonl", "eval.json"


class State:
    """Finished measurements by what they are of: a line each in ``FINISHED``.

    A key holds all that a measurement depends on, so that what is found under it is never stale,
    and checkpoints, lengths and forms can be added to a folder. Without a folder nothing is kept
    beyond this process.

    Raises: InvalidRecipe where ``folder`` is a file or holds an ``RESULT`` of something else;
        UnreadableInput, OutOfResources where it can't be read or written.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._finished: dict[str, Found] = {}
        if folder is None:
            return
        self._path = folder / FINISHED
        prepare_results(folder, RESULT, "hysparse.eval/")
        with reads(self._path):
            self._read()

    def get(self, key: Key) -> Found | None:
        return self._finished.get(_name(key))

    def put(self, key: Key, found: Found) -> None:
        """Keep ``found``: once this returns, it stays whatever happens.

        Raises: OutOfResources where it can't be written.
        """
        self._finished[_name(key)] = found
        if self.folder is None:
            return
        line = json.dumps({"key": key, "found": found}) + "\n"
        with writes(self._path):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
            sync(self._path)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write ``result`` as ``RESULT``, which is there whole or not at all.

        Raises: OutOfResources where it can't be written.
        """
        if self.folder is None:
            return
        write_whole(self.folder / RESULT, json.dumps(result, indent=2) + "\n")

    def _read(self) -> None:
        """Take up what is there; a line that a killed run left unfinished is cut off."""
        if not self._path.exists():
            return
        whole = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    entry = parse_json(line, str(self._path))
                    self._finished[_name(entry["key"])] = entry["found"]
                except (UnreadableInput, KeyError, TypeError):
                    raise UnreadableInput(
                        f"{self._path}, line {number} is not what hysparse eval wrote: give "
                        "another --output, or remove the file to measure again"
                    ) from None
        if whole < self._path.stat().st_size:
            with writes(self._path):
                os.truncate(self._path, whole)


def file_as_it_is(path: Path) -> list[Any]:
    """What to put in a key for a file: another one, or the same one changed, gives another."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _name(key: Key) -> str:
    return json.dumps(key, sort_keys=True)
