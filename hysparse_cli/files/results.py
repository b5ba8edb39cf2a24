"""A folder that results are written to, which may hold other things, but nothing by their names."""

from collections.abc import Sequence
from pathlib import Path

from hysparse_cli.errors import HysparseError, InvalidRecipe, writes
from hysparse_cli.files.output import prepare_file
from hysparse_cli.files.reading import read_json
from hysparse_cli.printable import printable


def prepare_results(folder: Path, result: str, schema: str, others: Sequence[str] = ()) -> None:
    """Make ``folder``, and check that results can be written to it before any work is done.

    Args:
        result: the name of the JSON file that is written first of all. schema: how its ``schema``
            begins: what has it was written by the same command and may be replaced.
        others: patterns of the names of what is written after it.
    Raises: InvalidRecipe where ``folder`` is a file, or something else has one of these names;
        OutOfResources where it can't be written.
    """
    name = printable(folder)
    with writes(name):
        if folder.exists() and not folder.is_dir():
            raise InvalidRecipe(f"output {name} is a file: give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        there = (folder / result).exists()
        strangers = [path for pattern in others for path in folder.glob(pattern)]
    if there and not _has_schema(folder / result, schema):
        strangers.insert(0, folder / result)
    elif there:
        strangers = []
    if strangers:
        raise InvalidRecipe(
            f"{printable(strangers[0])} is not what this command wrote, and would be replaced: "
            "give another --output, or move that file away"
        )
    prepare_file(folder / result)


def _has_schema(path: Path, schema: str) -> bool:
    try:
        content = read_json(path)
    except HysparseError:
        return False
    return isinstance(content, dict) and str(content.get("schema")).startswith(schema)
