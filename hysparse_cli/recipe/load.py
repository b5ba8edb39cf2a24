"""Reads one command's options from a recipe file, ``--set`` and flags."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.files.reading import parse_yaml, read_yaml
from hysparse_cli.printable import printable
from hysparse_cli.recipe.bench import BenchOptions
from hysparse_cli.recipe.convert import ConvertOptions
from hysparse_cli.recipe.evaluate import EvalOptions
from hysparse_cli.recipe.fields import Section
from hysparse_cli.recipe.finetune import FinetuneOptions
from hysparse_cli.recipe.generate import GenerateOptions
from hysparse_cli.recipe.inspect_topk import InspectOptions


class Recipe(Section):
    """A whole recipe file; a section that is absent has its defaults."""

    convert: ConvertOptions = ConvertOptions()
    finetune: FinetuneOptions = FinetuneOptions()
    eval: EvalOptions = EvalOptions()
    bench: BenchOptions = BenchOptions()
    inspect_topk: InspectOptions = InspectOptions()
    generate: GenerateOptions = GenerateOptions()


ONE_TIME = ("overwrite", "resume", "trust_remote_code")

S = TypeVar("S", bound=Section)


def load_section(
    kind: type[S],
    recipe_path: Path | None = None,
    assignments: Sequence[str] | None = None,
    flags: dict[str, Any] | None = None,
) -> S:
    """The options of one command from a recipe, ``section.field=value`` assignments and flags.

    Args:
        kind: the section's class, such as ``ConvertOptions``.
        recipe_path: a YAML file, or None.
        assignments: what ``--set`` was given; values are read as YAML.
        flags: field -> value or its text, as in a recipe; None means the flag was not given.
    Raises: InvalidRecipe naming every wrong field at once; UnreadableInput where the file
        can't be read.
    """
    name = name_of(kind)
    source = str(recipe_path) if recipe_path else "options"
    data = _read_yaml(recipe_path) if recipe_path else {}
    for assignment in assignments or ():
        _assign(data, assignment)
    given = {field: value for field, value in (flags or {}).items() if value is not None}
    section = data.setdefault(name, {})
    if isinstance(section, dict):
        section.update(given)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise InvalidRecipe(f"{source}: {_all_errors(error)}") from None
    resolved: S = getattr(recipe, name)
    return resolved


def name_of(kind: type[Section]) -> str:
    """The name that a recipe gives the section."""
    return next(n for n, field in Recipe.model_fields.items() if field.annotation is kind)


def to_yaml(section: Section) -> str:
    """The resolved section as a recipe that ``load_section`` reads back, all but the permissions
    that were given for this one run."""
    return yaml.safe_dump(
        {name_of(type(section)): lasting(section.model_dump(mode="json"))}, sort_keys=False
    )


def lasting(section: dict[str, Any]) -> dict[str, Any]:
    """The options of a section without those that were allowed or asked for once."""
    return {field: value for field, value in section.items() if field not in ONE_TIME}


def _read_yaml(path: Path) -> dict[str, Any]:
    data = read_yaml(path, "recipe")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InvalidRecipe(
            f"recipe {path} holds a {type(data).__name__}: it must be a mapping of sections, "
            f"such as {', '.join(Recipe.model_fields)}"
        )
    return data


def _assign(data: dict[str, Any], assignment: str) -> None:
    path, separator, value = assignment.partition("=")
    section, dot, field = path.partition(".")
    if not (separator and dot and field):
        raise InvalidRecipe(
            f"--set {assignment!r} is not section.field=value, such as convert.block_size=32"
        )
    parsed = parse_yaml(value, f"the value of --set {assignment!r}")
    target = data.setdefault(section, {})
    if isinstance(target, dict):
        target[field] = parsed


def _all_errors(error: ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(map(str, item["loc"])) or "recipe"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = _known_fields(item["loc"][:-1])
            near = get_close_matches(str(item["loc"][-1]), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            message = f"unknown field; {hint}"
        elif isinstance(item["input"], (str, int, float, bool, list)):
            message = f"{message} (got {printable(repr(item['input']))})"
        parts.append(f"{where}: {message}")
    return "; ".join(parts)


def _known_fields(loc: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in loc:
        if isinstance(part, int):  # in a list of sections
            continue
        annotation = model.model_fields[part].annotation
        annotation = next(iter(get_args(annotation)), annotation)
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)
