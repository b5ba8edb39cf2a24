"""Finds code that a checkpoint brings, before anything is loaded, and refuses it unless trusted.

transformers runs Python files that a checkpoint's JSON files name in ``auto_map``, and
``custom_generate/generate.py`` without being told. It asks on stdin where it was not told whether
it may; here it is always told. A kernel of the hub that config.json names is code too, and is never
fetched: see config_json.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.files.reading import read_json
from hysparse_cli.model.config import MODEL_TYPE, SHIM_AUTO_MAP
from hysparse_cli.printable import printable

FLAG = "--trust-remote-code"
CUSTOM_GENERATE = "custom_generate"
# what transformers reads of a checkpoint besides weights, their index and the vocabulary
SETTINGS = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "adapter_config.json",
)


def check_code(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a checkpoint's own code unless ``trust_remote_code``.

    The shim of a converted checkpoint is ours: it is never run where this package is installed.

    Raises: UnreadableInput where it brings code, or settings that can't be read.
    """
    if trust_remote_code or not folder.is_dir():
        return
    if (folder / CUSTOM_GENERATE).exists():
        raise brings_code(f"{folder / CUSTOM_GENERATE}/")
    for name in SETTINGS:
        path = folder / name
        if not path.is_file():
            continue
        settings = read_json(path)
        if "configuration_files" in (settings if isinstance(settings, dict) else ()):
            raise UnreadableInput(
                f"{path} names other files in its place (configuration_files), which are not read: "
                "leave that field out"
            )
        for named in _auto_maps(settings):
            if not (_is_converted(name, settings) and named == SHIM_AUTO_MAP):
                raise brings_code(f"{path}, auto_map {printable(named, 100)}")


def brings_code(what: str) -> UnreadableInput:
    """The refusal of code that ``what`` names."""
    return UnreadableInput(
        f"the checkpoint brings Python code of its own ({what}): read it, and give {FLAG} to let "
        "it run on this machine"
    )


def _auto_maps(settings: Any) -> Iterator[Any]:
    """Every auto_map that names something, in whatever part."""
    waiting = [settings]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if part.get("auto_map"):
                yield part["auto_map"]
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)


def _is_converted(name: str, settings: Any) -> bool:
    return name == "config.json" and settings.get("model_type") == MODEL_TYPE
