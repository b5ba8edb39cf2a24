"""Keeps what an evaluation has finished on disk, so that a stopped one goes on from there."""

import json
from pathlib import Path
from typing import Any

from hysparse_cli.files.journal import Journal, Line
from hysparse_cli.files.output import write_whole
from hysparse_cli.files.results import prepare_results

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
        if folder is not None:
            prepare_results(folder, RESULT, "hysparse.eval/")
        self._journal = Journal(folder and folder / FINISHED, "eval", self._take)

    def get(self, key: Key) -> Found | None:
        return self._finished.get(_name(key))

    def put(self, key: Key, found: Found) -> None:
        """Keep ``found``: once this returns, it stays whatever happens.

        Raises: OutOfResources where it can't be written.
        """
        self._finished[_name(key)] = found
        self._journal.append({"key": key, "found": found})

    def write_result(self, result: dict[str, Any]) -> None:
        """Write ``result`` as ``RESULT``, which is there whole or not at all.

        Raises: OutOfResources where it can't be written.
        """
        if self.folder is None:
            return
        write_whole(self.folder / RESULT, json.dumps(result, indent=2) + "\n")

    def _take(self, line: Line) -> None:
        self._finished[_name(line["key"])] = line["found"]


def file_as_it_is(path: Path) -> list[Any]:
    """What to put in a key for a file: another one, or the same one changed, gives another."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _name(key: Key) -> str:
    return json.dumps(key, sort_keys=True)
