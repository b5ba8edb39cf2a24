"""Runs ``hysparse convert``."""

from typing import TYPE_CHECKING, Annotated

import typer

from hysparse_cli.cli.shared import AsJson, Out, given, show, warn
from hysparse_cli.progress import progress, stages

if TYPE_CHECKING:
    from hysparse_cli.recipe import ConvertOptions


def convert(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub id.", parser=given)],
    out: Out,
    options: "ConvertOptions",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, write no checkpoint.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a dense checkpoint into a HySparse one."""
    from hysparse_cli.convert.dense import read_dense
    from hysparse_cli.files.leftovers import left_alone
    from hysparse_cli.files.output import prepare_output
    from hysparse_cli.files.replaceable import check_output
    from hysparse_cli.files.source import locate

    source = locate(model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    check = check_output if dry_run else prepare_output
    check(out, overwrite=options.overwrite, inputs=[source.folder])
    warn(left_alone(out))
    with stages() as advance_stage:
        advance_stage("reading headers", 0, 1)
        checkpoint = read_dense(source)
        # these import the models of transformers, which takes seconds
        from hysparse_cli.convert.decide import decide, dense_model, measure
        from hysparse_cli.convert.table import conversion_table, measured_table, plan_table
        from hysparse_cli.convert.write import execute

        dense = dense_model(source, options)
        plan = decide(checkpoint, options, dense, out, advance_stage)
    if not as_json:
        show(plan, as_json=False, as_table=plan_table)
    if plan.runs_the_model and (options.explain or not dry_run):
        with stages() as advance_stage:
            plan = measure(plan, dense, advance_stage)
        if not as_json:
            show(plan.measured, as_json=False, as_table=measured_table)
    del dense  # its memory is free before weights are written
    if dry_run:
        if as_json:
            show(plan, as_json=True)
        warn(plan.warnings)
        return
    with progress(f"writing {out.name}") as advance:
        conversion = execute(plan, out, advance)
    warn(conversion.warnings)
    show(conversion, as_json, as_table=conversion_table)
