"""``hysparse generate``: prints the text as it comes."""

import sys
from contextlib import ExitStack
from typing import Annotated

import typer

from hysparse_cli.cli.shared import (
    AsJson,
    Assignments,
    Checkpoint,
    Device,
    Dtype,
    RecipeFile,
    TrustRemoteCode,
    hint,
    say,
    show,
    write,
)
from hysparse_cli.printable import cells
from hysparse_cli.progress import stages


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
    trust_remote_code: TrustRemoteCode = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    from hysparse_cli.recipe import GenerateOptions, load_section

    options = load_section(GenerateOptions, recipe, assignments, locals())
    if options.prompt is None and not sys.stdin.isatty():
        options = options.model_copy(update={"prompt": sys.stdin.read()})
    from hysparse_cli import generate as generation

    shown = _on_a_terminal if sys.stdout.isatty() else write
    with ExitStack() as waiting:
        on_stage = waiting.enter_context(stages())

        def on_text(text: str) -> None:
            if not as_json:
                waiting.close()  # no bar where text runs
                shown(text)

        result = generation.generate(checkpoint, options, on_text, on_stage)
    hint([checkpoint])
    if as_json:
        show(result, as_json)
        return
    write("\n")
    say(result.summary())


def _on_a_terminal(text: str) -> None:
    write("".join(c if c in "\n\t" else cells(c) for c in text))  # a model may write escape codes
