"""``hysparse generate``: prints the text as it comes."""

import sys
from typing import Annotated

import typer

from hysparse_cli.cli.shared import (
    AsJson,
    Assignments,
    Checkpoint,
    Device,
    Dtype,
    RecipeFile,
    show,
)


def generate(
    checkpoint: Checkpoint,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    prompt: Annotated[str | None, typer.Option(help="What to continue.  [default: stdin]")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="[default: 128]")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token.  [default: 0]")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat", help="Put the prompt into the chat template.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    from hysparse_cli.recipe import GenerateOptions, load_section

    options = load_section(GenerateOptions, recipe, assignments, locals())
    if options.prompt is None and not sys.stdin.isatty():
        options = options.model_copy(update={"prompt": sys.stdin.read()})
    from hysparse_cli import generate as generation

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    result = generation.generate(checkpoint, options, (lambda text: None) if as_json else write)
    if as_json:
        show(result, as_json)
        return
    write("\n")
    sys.stderr.write(f"hysparse: {result.summary()}\n")
