"""``hysparse eval``."""

from typing import Annotated

import typer

from hysparse_cli.cli.shared import (
    DATA,
    AsJson,
    Assignments,
    Device,
    Dtype,
    RecipeFile,
    SkipBadRows,
    TrustRemoteCode,
    given,
    hint,
    show,
    warn,
)
from hysparse_cli.errors import QualityGateFailed
from hysparse_cli.progress import stages


def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Folders or hub ids, side by side.", parser=given)
    ],
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    data: Annotated[str | None, typer.Option(help=f"{DATA}.", parser=given)] = None,
    skip_bad_rows: SkipBadRows = None,
    sequence_tokens: Annotated[
        int | None, typer.Option(help="Tokens the loss is measured over at once.  [default: 2048]")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Slide that window by so many.  [default: sequence_tokens]"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Measure the loss on about so many.  [default: all]")
    ] = None,
    retrieval_tokens: Annotated[
        str | None, typer.Option(help="Context lengths to retrieve from, such as 1k,4k,32k.")
    ] = None,
    retrieval_forms: Annotated[
        str | None,
        typer.Option(help="Such as recall,multi-key; ruler: its families.  [default: four forms]"),
    ] = None,
    retrieval_samples: Annotated[
        int | None, typer.Option(help="Contexts of each form and length.  [default: 10]")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, such as mmlu,gsm8k.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 6 unless it holds: loss<=dense+0.01, retrieval@8k>=0.9."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Keep what is finished here, and go on from it.", parser=given),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="[default: 1]")] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss and retrieval of several checkpoints at once."""
    from hysparse_cli.recipe import EvalOptions, load_section, name_list, token_counts

    flags = locals() | {
        "retrieval_tokens": token_counts("retrieval_tokens", retrieval_tokens),
        "retrieval_forms": name_list(retrieval_forms),
        "lm_eval": name_list(lm_eval),
        "require": require or None,
    }
    options = load_section(EvalOptions, recipe, assignments, flags)
    from hysparse_cli import evaluate as evaluation

    with stages() as advance:
        result = evaluation.evaluate(checkpoints, options, advance)
    warn(result.bad_rows.warnings(options.data))
    hint(checkpoints)
    show(result, as_json, evaluation.tables)
    if failures := result.failures():
        raise QualityGateFailed(f"required {'; '.join(failures)}")
