"""``hysparse inspect-topk``."""

from typing import Annotated

import typer

from hysparse_cli.cli.shared import (
    DATA,
    AsJson,
    Assignments,
    Checkpoint,
    Device,
    Dtype,
    RecipeFile,
    TrustRemoteCode,
    given,
    hint,
    show,
)
from hysparse_cli.progress import stages

LAYOUT = ("pattern", "ratio", "strategy", "block_size", "top_k_tokens", "window_tokens")


def inspect_topk(
    checkpoint: Checkpoint,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    prompt: Annotated[str | None, typer.Option(help="The text to read.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"{DATA}, to read the first document of.  [default: made up]", parser=given
        ),
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(help="Read at most so much of it.  [default: 2048]")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Dense: the layout to look at, FSSSF...")
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(help="Dense: full to sparse layers.  [default: 1:3]")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Dense: as convert's.  [default: uniform]")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Dense: tokens in a block.  [default: 64]")
    ] = None,
    top_k_tokens: Annotated[
        int | None, typer.Option(help="Dense: tokens to select.  [default: 1024]")
    ] = None,
    window_tokens: Annotated[
        int | None, typer.Option(help="Dense: sliding window.  [default: 128]")
    ] = None,
    needle: Annotated[
        str | None, typer.Option(help="Part of the text: who selects and reads its blocks?")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="What the text should end in, knowing the needle.")
    ] = None,
    html: Annotated[str | None, typer.Option(help="A page to write.", parser=given)] = None,
    png: Annotated[str | None, typer.Option(help="A picture to write.", parser=given)] = None,
    npz: Annotated[
        str | None, typer.Option(help="A file to write all arrays to.", parser=given)
    ] = None,
    lists: Annotated[
        str | None,
        typer.Option(help="A safetensors file of the lists, for bench --lists.", parser=given),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: AsJson = False,
) -> None:
    """Show what full layers select, and how well it fits others.

    A converted checkpoint runs as it is; a dense one densely, under the layout of convert. A file
    that this command wrote is replaced, no other.
    """
    from hysparse_cli.recipe import (
        ConvertOptions,
        InspectOptions,
        load_section,
        token_count,
    )

    flags = locals() | {"max_tokens": token_count("max_tokens", max_tokens)}
    options = load_section(InspectOptions, recipe, assignments, flags)
    layout = {name: flags[name] for name in LAYOUT if flags[name] is not None}
    planned = load_section(ConvertOptions, recipe, assignments, layout)
    asked = [f"--{name.replace('_', '-')}" for name in layout]
    from hysparse_cli import inspect_topk as inspection

    inspection.check_files(checkpoint, options)
    with stages() as on_stage:
        found = inspection.inspect_topk(checkpoint, options, planned, asked, on_stage)
    hint([checkpoint])
    show(found, as_json, inspection.as_table)
    inspection.write_files(found)
