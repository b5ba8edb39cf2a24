"""Puts a field's type, default and help into words, for --help and docs/recipes.md."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from hysparse_cli.recipe.fields import Help, Listed, Section, Text

SIGNS = {Gt: ">", Ge: "≥", Lt: "<", Le: "≤"}
MACHINE_LIMITS = (2**31, 2**32)  # bounds of no interest to a reader


@dataclass(frozen=True)
class Description:
    """Describes a field.

    name: what --help calls a value: "tokens", "tokens,..." where commas part several.
    type: the same with choices and bounds. help: what it is, without choices.
    default: None where there is nothing to say. line: all that --help says.
    """

    name: str
    type: str
    help: str
    default: str | None
    line: str


def describe(field: FieldInfo) -> Description:
    """Describe a field of a section.

    Raises: StopIteration where its type has no Help.
    """
    parts = list(parts_of(field))
    help_ = next(part for part in parts if isinstance(part, Help))
    choices = [v for part in parts if get_origin(part) is Literal for v in get_args(part)]
    name, default = _name(parts), help_.default or _value_words(field.default)
    line = f"{help_.text} {either(choices)}." if help_.text.endswith(":") else help_.text
    return Description(
        name=f"{name},..." if any(isinstance(p, Listed) and p.separator for p in parts) else name,
        type=_type(parts, name, [f"`{choice}`" for choice in choices]),
        help=f"{help_.text[:-1]}." if help_.text.endswith(":") else help_.text,
        default=default,
        line=line if default is None else f"{line}  [default: {default}]",
    )


def parts_of(field: FieldInfo) -> Iterator[Any]:
    """Everything that a field's type is made of: types, choices, bounds, Text, Listed, Help."""
    for part in (field.annotation, *field.metadata):
        yield from _parts(part)


def either(names: Sequence[str]) -> str:
    """``a, b or c``."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _parts(part: Any) -> Iterator[Any]:
    yield part
    for inner in part.metadata if isinstance(part, FieldInfo) else get_args(part):
        yield from _parts(inner)


def _name(parts: Sequence[Any]) -> str:
    for part in parts:
        if isinstance(part, Text):
            return part.name
    if any(get_origin(part) is Literal for part in parts):
        return "name"
    return "bool" if bool in parts else "text"


def _type(parts: Sequence[Any], name: str, choices: Sequence[str]) -> str:
    if any(isinstance(part, type) and issubclass(part, Section) for part in parts):
        return "list of stages"
    bounds = {SIGNS[type(p)]: p for p in parts if type(p) in SIGNS}  # of two the stricter, last
    limits = {sign: getattr(p, type(p).__name__.lower()) for sign, p in bounds.items()}
    words = either(choices) if name == "name" else name
    words += "".join(
        f" {s} {limit:g}" for s, limit in limits.items() if limit not in MACHINE_LIMITS
    )
    if any(get_origin(part) is list for part in parts):
        words = f"list of {words}"
    return words if name == "name" else either([words, *choices])


def _value_words(value: object) -> str | None:
    if value is None or isinstance(value, bool) or value == []:
        return None
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
