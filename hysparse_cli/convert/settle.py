"""The plan that is carried out: where an option lets the dense model decide, its decision is in."""

from collections.abc import Callable
from pathlib import Path

from hysparse_cli.convert.plan import Plan
from hysparse_cli.convert.run import plan
from hysparse_cli.files.source import Source
from hysparse_cli.recipe import ConvertOptions


def settled_plan(
    source: Source,
    options: ConvertOptions,
    out: Path,
    on_progress: Callable[[str, int, int], None],
) -> Plan:
    """The plan with the pattern that the strategy chooses and the swaps that "auto" chooses.

    Args:
        out: where the checkpoint will be; what a strategy measures is kept in OUT.scores.json,
            unless ``options`` names a file.
        on_progress: is told the stage, and steps done and in all.
    Raises: UnreadableInput, UnsupportedModel, InvalidRecipe; OutOfResources where the model has to
        be run and does not fit.
    """
    on_progress("reading headers", 0, 1)
    planned = plan(source, options)
    if options.measures:
        from hysparse_cli.placement.run import select

        scores = Path(options.scores or out.with_name(f"{out.name}.scores.json"))
        selection = select(source, options, planned.spec.pattern, scores, on_progress)
        planned = plan(source, options, selection)
    if options.swap_attention == "auto":
        from hysparse_cli.placement.run import choose_attention

        swaps = choose_attention(source, options, planned.spec, on_progress)
        planned = plan(source, options, planned.selection, swaps)
    return planned
