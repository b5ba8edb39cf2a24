"""What a malformed checkpoint is: a kind, a name and what is done to a good one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Damage = Callable[[Path], object]
DEEP = "[" * 200_000 + "]" * 200_000
LONG = "n" * 100_000
ESCAPES = "\x1b[31mred\u202eder\n\ttab"
RAW = {
    "deep": DEEP,
    "4,400 digits": "9" * 4400,
    "40 digits": "9" * 40,
    "lone surrogate": '"\\ud800"',
}


class Case(NamedTuple):
    kind: str
    name: str
    damage: Damage


WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "0": 0,
    "-1": -1,
    "-2": -2,
    "1": 1,
    "3": 3,
    "1.5": 1.5,
    "1e9": 10**9,
    "2**63": 2**63,
    "1e308": 1e308,
    "NaN": math.nan,
    "Infinity": math.inf,
    "empty text": "",
    "text": "yes",
    "long text": LONG,
    "escapes": ESCAPES,
    "empty list": [],
    "list": [1, 2],
    "list of text": ["x"],
    "long list": ["full_attention"] * 1_000_000,
    "empty object": {},
    "object": {"a": 1},
    "object of objects": {"a": {"b": [None]}},
}


def set_json(file: str, **values: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change
