"""Defines the types of recipe fields: how each is written, and what --help says of it.

A field is ``Annotated[type, Flag(help)] = default``, or ``Help`` where only a recipe and ``--set``
reach it. The same type reads a flag, YAML and ``--set``, so that all three take ``8k``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.annotated_handlers import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from hysparse_cli.files.paths import check_given, expanded

T = TypeVar("T")


@dataclass(frozen=True)
class Help:
    """Says what a field is; one that ends in a colon is followed by the type's choices.

    default: what applies where nothing is given, if the field's default does not say it.
    """

    text: str
    default: str | None = None


@dataclass(frozen=True)
class Flag(Help):
    """A Help that also makes the field a flag of its command."""


@dataclass(frozen=True)
class Text:
    """Says how a value is written: its name in --help, and what reads it from text.

    read: raises ValueError where the text can't be such a value; for a flag that is wrong usage.
        None leaves the text to the type's other validators.
    """

    name: str
    read: Callable[[str], object] | None = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._value, handler(source))

    def _value(self, value: object) -> object:
        return self.read(value) if self.read and isinstance(value, str) else value


@dataclass(frozen=True)
class Listed:
    """Lets one value be a list of one, and parts text at the separator.

    separator: None where text is one value; its flag is then given several times.
    """

    separator: str | None = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._value, handler(source))

    def _value(self, value: object) -> object:
        if isinstance(value, str) and self.separator:
            return [part.strip() for part in value.split(self.separator)]
        return [value] if isinstance(value, (str, int, float)) else value


def bytes_of(size: str) -> int:
    """The bytes of a size such as ``5GB``, ``300 MiB`` or ``1000000``.

    Raises: ValueError where it is not a number and a unit.
    """
    found = re.fullmatch(r"([0-9]{1,18}) ?([A-Za-z]*)", size.strip())
    if not found or found[2].upper() not in _UNITS or not int(found[1]):
        raise ValueError("not a size such as 5GB, 500MB or 2GiB")
    return int(found[1]) * _UNITS[found[2].upper()]


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def integer(text: str) -> int:
    """The number that ``text`` is, in digits.

    Raises: ValueError.
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
        raise ValueError("not a whole number such as 64")
    return int(text)


def _tokens(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([+-]?[0-9]{1,9})([kK]?)", value.strip())
    if not found:
        raise ValueError("not one length such as 512 or 8k")
    return int(found[1]) * (1024 if found[2] else 1)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("not a number such as 0.1 or 3e-4") from None


def _size(value: object) -> object:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str):
        bytes_of(text)
    return text


FilePath = Annotated[str, Text("path", expanded)]
ModelName = Annotated[str, Text("model", check_given)]  # a folder or hub id
Ratio = Annotated[str, Text("1:N")]
Size = Annotated[str, Text("size"), BeforeValidator(_size)]
Count = Annotated[int, Text("int", integer), Field(ge=0)]
Positive = Annotated[int, Text("int", integer), Field(gt=0, lt=2**31)]
Tokens = Annotated[int, Text("tokens"), BeforeValidator(_tokens), Field(gt=0, lt=2**31)]
SeveralTokens = Annotated[Tokens, Field(gt=1)]
Real = Annotated[float, Text("number", _number), Field(allow_inf_nan=False)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Beta = Annotated[Real, Field(ge=0, lt=1)]
CommaList = Annotated[list[T], Listed(",")]
Repeated = Annotated[list[T], Listed()]

# fields that several sections have
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Flag("Type of the weights:", "auto, as they are"),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], Flag("Where to run:", "auto, cuda if there is one")
]
TrustRemoteCode = Annotated[
    bool,
    Flag("Run the Python code that a checkpoint brings (auto_map): it can do what you can."),
]
Overwrite = Annotated[bool, Flag("Replace a checkpoint in OUT.")]
SkipBadRows = Annotated[bool, Flag("Count rows without text instead of refusing them.")]
TextField = Annotated[str, Help("Field or column that holds the text.")]
Seed = Annotated[
    int, Text("int", integer), Field(ge=0, lt=2**32), Help("Seed of all that is random.")
]
TEXT_FILE = "Text, jsonl, json, csv, tsv or parquet file (also .gz, .xz, .bz2, .zst)"


class Section(BaseModel):
    """A command's options: unknown fields and loose types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
