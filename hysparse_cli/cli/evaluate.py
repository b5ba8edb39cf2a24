"""``hysparse eval``."""

from typing import Annotated

import typer

from hysparse_cli.cli.shared import AsJson, Assignments, Device, Dtype, RecipeFile, show
from hysparse_cli.progress import stages


def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="Folders or hub ids, side by side.")],
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    data: Annotated[str | None, typer.Option(help="Text or jsonl file (.xz, .gz) to read.")] = None,
    sequence_tokens: Annotated[
        int | None, typer.Option(help="Tokens the loss is measured over at once.  [default: 2048]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Measure the loss on about so many.  [default: all]")
    ] = None,
    retrieval_tokens: Annotated[
        str | None, typer.Option(help="Context lengths to retrieve from, such as 1024,4096.")
    ] = None,
    retrieval_samples: Annotated[
        int | None, typer.Option(help="Contexts of each form and length.  [default: 10]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="[default: 1]")] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss on text and retrieval from the context, for several checkpoints at once."""
    from hysparse_cli.recipe import EvalOptions, integer_list, load_section

    flags = locals() | {"retrieval_tokens": integer_list("retrieval_tokens", retrieval_tokens)}
    options = load_section(EvalOptions, recipe, assignments, flags)
    from hysparse_cli import evaluate as evaluation

    with stages() as advance:
        result = evaluation.evaluate(checkpoints, options, advance)
    show(result, as_json)
