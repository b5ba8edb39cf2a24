"""Every command's options, typed: a YAML recipe, flags and ``--set a.b=c`` in, one section out.

A recipe has a section for each command, and its keys are the flags with underscores. A recipe holds
all options of a command; the common ones have a flag. Later sources win: recipe, ``--set``, flags.
"""

from hysparse_cli.recipe.bench import BenchOptions, KernelBenchOptions
from hysparse_cli.recipe.convert import ConvertOptions
from hysparse_cli.recipe.evaluate import EvalOptions
from hysparse_cli.recipe.fields import Section, bytes_of
from hysparse_cli.recipe.finetune import FinetuneOptions
from hysparse_cli.recipe.generate import GenerateOptions
from hysparse_cli.recipe.inspect_topk import InspectOptions
from hysparse_cli.recipe.load import (
    Recipe,
    integer_list,
    lasting,
    layer_pairs,
    load_section,
    name_list,
    to_yaml,
    token_count,
    token_counts,
)

__all__ = [
    "BenchOptions",
    "ConvertOptions",
    "EvalOptions",
    "FinetuneOptions",
    "GenerateOptions",
    "InspectOptions",
    "KernelBenchOptions",
    "Recipe",
    "Section",
    "bytes_of",
    "integer_list",
    "lasting",
    "layer_pairs",
    "load_section",
    "name_list",
    "to_yaml",
    "token_count",
    "token_counts",
]
