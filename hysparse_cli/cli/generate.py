"""Runs ``hysparse generate``: prints the text as it comes."""

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hysparse_cli.cli.shared import AsJson, Checkpoint, hint, say, show, write
from hysparse_cli.printable import cells
from hysparse_cli.progress import stages

if TYPE_CHECKING:
    from hysparse_cli.recipe import GenerateOptions


def generate(checkpoint: Checkpoint, options: "GenerateOptions", as_json: AsJson = False) -> None:
    """Continue a prompt."""
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
