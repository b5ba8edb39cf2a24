"""Checks where a command may write, and what it may replace: checkpoints and nothing else.

A folder is replaced where all that it holds can be had again: what the hub's repositories of models
hold, and what this tool writes. Trained adapters, optimiser states, pickles, notes and sources are
none of it.
"""

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

from hysparse_cli.errors import HysparseError, InvalidRecipe, writes
from hysparse_cli.files.reading import read_json
from hysparse_cli.printable import printable

FILES_NAME = "hysparse_files.json"
FILES_SCHEMA = "hysparse.files/1"
CHECKPOINT_FILES = (
    *("config.json", "generation_config.json", "params.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("consolidated.safetensors", "consolidated-*.safetensors"),
    *("consolidated.safetensors.index.json",),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v*"),
    *("spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "tekken.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py"),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY.md", ".gitattributes"),
    *("hysparse_hub.py", "hysparse_recipe.yaml", "hysparse_report.json"),
    *("hysparse_finetune.json", FILES_NAME),
)
_TEMPLATES, _HUB_CACHE = "additional_chat_templates", Path(".cache", "huggingface")
_NAMED = 3


def check_output(out: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Check that ``out`` may be written.

    Raises: InvalidRecipe where ``out`` holds something that may not be replaced, or overlaps one of
        ``inputs`` (folders that the command reads); OutOfResources where it can't be looked at.
    """
    name = printable(out)
    with writes(name):
        _check_place(out, name, inputs)
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not overwrite:
            raise InvalidRecipe(f"OUT {name} is not empty: give another folder, or --overwrite")
        check_replaceable(out, name)


def check_replaceable(folder: Path, name: str) -> None:
    """Check that ``folder``, which is called OUT ``name``, is a checkpoint and nothing else.

    Raises: InvalidRecipe.
    """
    alone = "--overwrite leaves it alone: give another folder"
    if not is_checkpoint(folder):
        raise InvalidRecipe(
            f"OUT {name} is not empty and has no config.json with a model_type, so it is no "
            f"checkpoint and {alone}"
        )
    if foreign := foreign_in(folder):
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        raise InvalidRecipe(
            f"OUT {name} holds what belongs to no checkpoint, {', '.join(foreign[:_NAMED])}{more}, "
            f"so {alone}"
        )


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` has a checkpoint's config.json."""
    try:
        config = read_json(folder / "config.json")
    except HysparseError:
        return False
    return isinstance(config, dict) and isinstance(config.get("model_type"), str)


def foreign_in(folder: Path) -> list[str]:
    """What is in ``folder`` and belongs to no checkpoint, nor was written there by this tool."""
    written = _written(folder)
    return [
        printable(path.relative_to(folder))
        for path in _strangers(folder)
        if not _is_as_written(path, written.get(str(path.relative_to(folder))))
    ]


def files_to_note(folder: Path) -> dict[str, Any] | None:
    """What ``FILES_NAME`` is to hold, so that ``folder`` can be replaced later: the hashes of the
    files that are not known by their names. None where all are."""
    files = [path for path in _strangers(folder) if path.is_file()]
    if not files:
        return None
    hashes = {str(path.relative_to(folder)): _hash(path) for path in files}
    return {"schema": FILES_SCHEMA, "sha256": hashes}


def lies_in(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or in it, by whichever names."""
    real = Path(os.path.realpath(path))
    around = (real, *real.parents)
    if not folder.exists():
        return Path(os.path.realpath(folder)) in around
    return any(os.path.samefile(place, folder) for place in around if place.exists())


def _check_place(out: Path, name: str, inputs: Sequence[Path]) -> None:
    if out.name in ("", ".."):
        raise InvalidRecipe(f"OUT {name} has no name of its own: give a folder that has")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InvalidRecipe(f"OUT {name} is not a folder: give another name")
    for folder in inputs:
        if lies_in(out, folder) and lies_in(folder, out):
            raise InvalidRecipe(f"OUT {name} is the input itself: give another folder")
        if lies_in(out, folder) or lies_in(folder, out):
            raise InvalidRecipe(
                f"OUT {name} and the input {printable(folder)} overlap: give a folder outside"
            )
    places = {"the working directory": Path.cwd(), "your home": Path(os.path.expanduser("~"))}
    for what, place in places.items():
        if lies_in(place, out):
            raise InvalidRecipe(f"OUT {name} is {what}, or holds it: give a folder of its own")
    if os.path.ismount(out):
        raise InvalidRecipe(f"OUT {name} is a mount point: give a folder inside it")


def _strangers(folder: Path) -> list[Path]:
    """What is in ``folder`` under names that say nothing."""
    found = []
    for path in sorted(folder.iterdir()):
        real_folder = path.is_dir() and not path.is_symlink()
        if real_folder and path.name == _TEMPLATES:
            found += [x for x in sorted(path.iterdir()) if x.suffix != ".jinja" or x.is_dir()]
        elif real_folder and path.name == _HUB_CACHE.parts[0]:
            found += [x for x in sorted(path.iterdir()) if x.name != _HUB_CACHE.name]
        elif path.is_dir() or not any(fnmatchcase(path.name, known) for known in CHECKPOINT_FILES):
            found.append(path)
    return found


def _written(folder: Path) -> dict[str, Any]:
    try:
        content = read_json(folder / FILES_NAME)
    except HysparseError:
        return {}
    hashes = content.get("sha256") if isinstance(content, dict) else None
    return hashes if isinstance(hashes, dict) else {}


def _is_as_written(path: Path, digest: Any) -> bool:
    return isinstance(digest, str) and path.is_file() and _hash(path) == digest


def _hash(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
