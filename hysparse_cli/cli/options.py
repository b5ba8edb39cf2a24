"""Makes a command's flags from the sections of a recipe that it takes.

A command is a function with a parameter annotated by a section's name, as in ``options:
"ConvertOptions"``. In place of it the command line has --recipe, --set and a flag for each field
whose help is a ``Flag``; the field's own type reads the flag's text, as it reads YAML.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ForwardRef, get_origin

import typer
from typer.core import TyperCommand
from typer.main import get_command

from hysparse_cli.cli.shared import Assignments, RecipeFile, usage

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from hysparse_cli.recipe import Section

Function = Callable[..., None]


@dataclass(frozen=True)
class Only:
    """Lets a command take some flags of a section that is another command's.

    note: comes before each help. before: the flag that they come before.
    """

    fields: tuple[str, ...]
    note: str
    before: str


class Command(TyperCommand):
    """A command that makes its parameters when it is called.

    Sections need pydantic, without which ``hysparse --help`` answers twice as fast.
    """

    def __init__(self, name: str, function: Function) -> None:
        super().__init__(name, help=inspect.cleandoc(function.__doc__ or ""))
        self.function = function

    def make_context(self, *args: Any, **options: Any) -> Any:
        return self.made.make_context(*args, **options)

    @cached_property
    def made(self) -> Any:
        """The command with its parameters."""
        app = typer.Typer(
            add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
        )
        app.command(self.name, help=self.help)(with_flags(self.function))
        return get_command(app)


def with_flags(function: Function) -> Function:
    """``function`` as typer reads it, with flags in place of sections."""
    from hysparse_cli.recipe import load_section

    own: list[inspect.Parameter] = []
    sections: dict[str, tuple[type[Section], list[str]]] = {}
    flags: dict[str, inspect.Parameter] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind, only = _section(parameter.annotation)
        if kind is None:
            own.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        shown = dict(_flags(kind, only))
        sections[parameter.name] = kind, list(shown)
        names = list(flags)
        place = names.index(only.before) if only else len(names)
        flags = {n: (flags | shown)[n] for n in (*names[:place], *shown, *names[place:])}
    if not sections:
        return function

    def run(**values: Any) -> None:
        recipe, assignments = values.pop("recipe"), values.pop("assignments")
        for name, (kind, fields) in sections.items():
            given = {field: values.pop(field) for field in fields}
            given = {field: value for field, value in given.items() if value not in (None, [])}
            values[name] = load_section(kind, recipe, assignments, given)
        function(**values)

    required = [p for p in own if p.default is p.empty]
    common = [_parameter("recipe", RecipeFile), _parameter("assignments", Assignments)]
    optional = [p for p in own if p.default is not p.empty]
    parameters = [*required, *common, *flags.values(), *optional]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _section(annotation: Any) -> "tuple[type[Section] | None, Only | None]":
    """The section that an annotation names, if it does, and which flags of it are shown."""
    from hysparse_cli.recipe import Recipe

    name, only = annotation, None
    if get_origin(annotation) is Annotated and isinstance(annotation.__origin__, ForwardRef):
        name, only = annotation.__origin__.__forward_arg__, annotation.__metadata__[0]
    for field in Recipe.model_fields.values():
        if isinstance(kind := field.annotation, type) and kind.__name__ == name:
            return kind, only
    return None, None


def _flags(kind: "type[Section]", only: Only | None) -> Iterator[tuple[str, inspect.Parameter]]:
    from hysparse_cli.recipe.fields import Flag

    for name in only.fields if only else kind.model_fields:
        field = kind.model_fields[name]
        if any(isinstance(part, Flag) for part in field.metadata):
            yield name, _flag(name, field, only.note if only else "")


def _flag(name: str, field: "FieldInfo", note: str) -> inspect.Parameter:
    from hysparse_cli.recipe.describe import describe, parts_of
    from hysparse_cli.recipe.fields import Listed, Text

    described, parts = describe(field), list(parts_of(field))
    text = described.line
    if note:
        text = f"{note}: {text[0].lower()}{text[1:]}"
    flag = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        flag = f"{flag}/--no-{flag[2:]}" if field.default else flag
        return _parameter(name, Annotated[bool | None, typer.Option(flag, help=text)])
    reads = [part.read for part in parts if isinstance(part, Text) and part.read]
    repeats = any(isinstance(part, Listed) and part.separator is None for part in parts)
    separated = any(isinstance(part, Listed) and part.separator for part in parts)
    option = typer.Option(
        flag,
        help=text,
        metavar=f"<{described.name}>",
        parser=usage(reads[0]) if reads and not separated else None,
    )
    return _parameter(name, Annotated[list[str] | None if repeats else str | None, option])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
