"""Reading JSON and YAML that other people wrote: limits on size, depth and length of numbers."""

import json
from pathlib import Path
from typing import Any

import yaml

from hysparse_cli.errors import InvalidRecipe, UnreadableInput, reads
from hysparse_cli.printable import single_line

MOST_JSON_BYTES = 16 << 20  # an index of 130,000 tensors; lists of lists take 50 times as much
MOST_YAML_BYTES = 256 << 10


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte-order mark.

    Raises: UnreadableInput where the file can't be read, is too large or is no JSON.
    """
    return parse_json(_read(path, most_bytes), str(path))


def parse_json(raw: bytes | str, where: str) -> Any:
    """What ``raw`` holds.

    Args:
        where: the file, and the line or the like, for the message.
    Raises: UnreadableInput where it is no JSON, or nested or numbered beyond reason.
    """
    try:
        return json.loads(raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw)
    except RecursionError:
        raise UnreadableInput(f"{where} is nested too deeply to be read") from None
    except ValueError as error:  # no JSON, no UTF-8, or an integer of thousands of digits
        raise UnreadableInput(f"{where} is not valid JSON: {single_line(error)}") from None


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file, without aliases, whose few bytes may stand for gigabytes.

    Args:
        what: the file is, for messages: "recipe".
    Raises: UnreadableInput where the file can't be read; InvalidRecipe where it is no YAML.
    """
    return parse_yaml(_read(path, MOST_YAML_BYTES), f"{what} {path}")


def parse_yaml(raw: bytes | str, where: str) -> Any:
    """What ``raw`` holds.

    Raises: InvalidRecipe where it is no YAML, has aliases or is nested too deeply.
    """
    try:
        return yaml.load(raw, _Loader)
    except RecursionError:
        raise InvalidRecipe(f"{where} is nested too deeply to be read") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InvalidRecipe(f"{where} is not valid YAML: {single_line(error)}") from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, f"alias *{event.anchor}: write out what it stands for", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> Any:
        """``1:3`` is text, as in YAML 1.2, and not three and sixty."""
        return node.value if ":" in node.value else super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _read(path: Path, most_bytes: int) -> bytes:
    with reads(path), path.open("rb") as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise UnreadableInput(
            f"{path} is larger than the {most_bytes:,} bytes such a file may have"
        )
    return raw
