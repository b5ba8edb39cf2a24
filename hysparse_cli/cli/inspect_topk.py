"""Runs ``hysparse inspect-topk``."""

from typing import TYPE_CHECKING, Annotated

import typer

from hysparse_cli.cli.options import Only
from hysparse_cli.cli.shared import AsJson, Checkpoint, hint, show
from hysparse_cli.progress import stages

if TYPE_CHECKING:
    from hysparse_cli.recipe import ConvertOptions, InspectOptions

LAYOUT = ("pattern", "ratio", "strategy", "block_size", "top_k_tokens", "window_tokens")


def inspect_topk(
    checkpoint: Checkpoint,
    options: "InspectOptions",
    planned: Annotated["ConvertOptions", Only(LAYOUT, "Dense", before="needle")],
    context: typer.Context,
    as_json: AsJson = False,
) -> None:
    """Show what full layers select, and how well it fits others.

    A converted checkpoint runs as it is; a dense one densely, under the layout of convert. A file
    that this command wrote is replaced, no other.
    """
    asked = [f"--{name.replace('_', '-')}" for name in LAYOUT if context.params[name] is not None]
    from hysparse_cli import inspect_topk as inspection

    inspection.check_files(checkpoint, options)
    with stages() as on_stage:
        found = inspection.inspect_topk(checkpoint, options, planned, asked, on_stage)
    hint([checkpoint])
    show(found, as_json)
    inspection.write_files(found)
