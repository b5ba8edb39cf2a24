"""``hysparse inspect-topk``."""

from typing import Annotated

import typer

from hysparse_cli.cli.shared import AsJson, Assignments, Device, Dtype, RecipeFile, show


def inspect_topk(
    checkpoint: Annotated[str, typer.Argument(help="A converted checkpoint.")],
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    prompt: Annotated[str | None, typer.Option(help="The text to read.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Or a text or jsonl file (.xz, .gz): its first document.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Read at most so much of it.  [default: 2048]")
    ] = None,
    lists: Annotated[
        str | None, typer.Option(help="A safetensors file to write the selected blocks to.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show which blocks the full layers select, and how well that fits the layers they serve."""
    from hysparse_cli.recipe import InspectOptions, load_section

    options = load_section(InspectOptions, recipe, assignments, locals())
    from hysparse_cli import inspect_topk as inspection

    show(inspection.inspect_topk(checkpoint, options), as_json)
