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
    from hysparse_cli.convert.run import execute
    from hysparse_cli.convert.settle import settled_plan
    from hysparse_cli.files.leftovers import left_alone
    from hysparse_cli.files.output import prepare_output
    from hysparse_cli.files.replaceable import check_output
    from hysparse_cli.files.source import locate

    source = locate(model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    check = check_output if dry_run else prepare_output
    check(out, overwrite=options.overwrite, inputs=[source.folder])
    warn(left_alone(out))
    with stages() as advance_stage:
        plan = settled_plan(source, options, out, advance_stage)
    if not as_json:
        show(plan, as_json=False)
    if plan.runs_the_model and (options.explain or not dry_run):
        from hysparse_cli.convert.measure import measured

        with stages() as advance_stage:
            plan = measured(plan, advance_stage)
        if not as_json:
            show(plan.measured, as_json=False)
    if dry_run:
        if as_json:
            show(plan, as_json=True)
        warn(plan.warnings)
        return
    with progress(f"writing {out.name}") as advance:
        conversion = execute(plan, out, advance)
    warn(conversion.warnings)
    show(conversion, as_json)
