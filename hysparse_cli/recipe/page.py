"""Writes docs/recipes.md, every field of every section: ``python -m hysparse_cli.recipe.page``."""

import inspect
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from hysparse_cli.recipe.describe import describe
from hysparse_cli.recipe.fields import Flag, Section
from hysparse_cli.recipe.finetune import StageOptions
from hysparse_cli.recipe.load import Recipe

PAGE = Path("docs") / "recipes.md"
INTRODUCTION = """\
# Recipes

<!-- Made by python -m hysparse_cli.recipe.page from the fields in hysparse_cli/recipe/. -->

A recipe is a YAML file with a section for each command; `--recipe FILE` reads it. Every option of a
command is a field of its section. `--set section.field=value` sets any field, and the common ones
have a flag: `block_size` is `--block-size`. A flag wins over `--set`, and `--set` over the recipe.
[recipes/](../recipes) holds some to begin with.

```yaml
convert:
  ratio: 1:3
  fit: 24GiB
  context: 32k
finetune:
  steps: 500
```

Values are written alike in all three places:

| type | is written |
|---|---|
| bool | `true` or `false`; its flag has no value |
| int, number | `64`; `0.1` or `3e-4` |
| tokens | `512`, or `8k`: a k is 1024 |
| size | `24GiB`, `5GB`, `500MB` or a number of bytes |
| 1:N | `1:3`: a full layer, then three sparse ones |
| a:b | `8:9`: two layers |
| path | a file or folder; `~` is the home |
| model | a folder or the id of a model on the hub |
| list | `[4k, 32k]` in YAML, `4k,32k` anywhere; one value is a list of one |

The flags of `against` and `require`, whose values may hold commas, are given once for each value.
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [INTRODUCTION]
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type) and issubclass(kind, Section)
        parts.append("\n".join(_section(f"`{name}:`", kind, has_flags=True)))
        if name == "finetune":
            parts.append("\n".join(_section("`finetune.stages:`", StageOptions, has_flags=False)))
    return "\n".join(parts)


def _section(title: str, kind: type[Section], *, has_flags: bool) -> Iterator[str]:
    yield f"## {title}\n"
    yield inspect.cleandoc(kind.__doc__ or "").replace("``", "`") + "\n"
    yield "| field | type | default | what it is |" + (" flag |" if has_flags else "")
    yield "|---|---|---|---|" + ("---|" if has_flags else "")
    for name, field in kind.model_fields.items():
        described = describe(field)
        cells = [f"`{name}`", described.type, _default(field, described.default), described.help]
        if has_flags:
            is_flag = any(isinstance(part, Flag) for part in field.metadata)
            cells.append(f"`--{name.replace('_', '-')}`" if is_flag else "")
        yield f"| {' | '.join(cells)} |"
    yield ""


def _default(field: FieldInfo, words: str | None) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, bool):
        return "true" if field.default else "false"
    return words or "none"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
