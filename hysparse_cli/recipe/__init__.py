"""Defines every command's options: a YAML recipe, ``--set a.b=c`` and flags in, one section out.

A recipe has a section for each command, and its keys are the flags with underscores. A recipe holds
all options of a command; the common ones have a flag. Later sources win: recipe, ``--set``, flags.
The commands' flags and docs/recipes.md are made from the sections' fields.
"""

from hysparse_cli.recipe.bench import BenchOptions
from hysparse_cli.recipe.convert import ConvertOptions
from hysparse_cli.recipe.evaluate import EvalOptions
from hysparse_cli.recipe.fields import Section, bytes_of
from hysparse_cli.recipe.finetune import FinetuneOptions
from hysparse_cli.recipe.generate import GenerateOptions
from hysparse_cli.recipe.inspect_topk import InspectOptions
from hysparse_cli.recipe.load import (
    Recipe,
    lasting,
    load_section,
    name_of,
    to_yaml,
)

__all__ = [
    "BenchOptions",
    "ConvertOptions",
    "EvalOptions",
    "FinetuneOptions",
    "GenerateOptions",
    "InspectOptions",
    "Recipe",
    "Section",
    "bytes_of",
    "lasting",
    "load_section",
    "name_of",
    "to_yaml",
]
