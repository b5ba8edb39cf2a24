"""Runs ``hysparse eval``."""

from typing import TYPE_CHECKING, Annotated

import typer

from hysparse_cli.cli.shared import AsJson, given, hint, show, warn
from hysparse_cli.errors import QualityGateFailed
from hysparse_cli.progress import stages

if TYPE_CHECKING:
    from hysparse_cli.recipe import EvalOptions


def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Folders or hub ids, side by side.", parser=given)
    ],
    options: "EvalOptions",
    as_json: AsJson = False,
) -> None:
    """Measure loss and retrieval of several checkpoints at once."""
    from hysparse_cli import evaluate as evaluation

    with stages() as advance:
        result = evaluation.evaluate(checkpoints, options, advance)
    warn(result.bad_rows.warnings(options.data))
    hint(checkpoints)
    show(result, as_json)
    if failures := result.failures():
        raise QualityGateFailed(f"required {'; '.join(failures)}")
