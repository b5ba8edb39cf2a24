"""``hysparse convert``."""

from typing import Annotated

import typer

from hysparse_cli.cli.shared import (
    DATA,
    AsJson,
    Assignments,
    Device,
    Dtype,
    Out,
    Overwrite,
    RecipeFile,
    TrustRemoteCode,
    given,
    show,
    warn,
)
from hysparse_cli.progress import progress, stages


def convert(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub id.", parser=given)],
    out: Out,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    layout: Annotated[
        str | None, typer.Option(help="hysparse, hybrid-swa or full.  [default: hysparse]")
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(help="Full to sparse layers.  [default: 1:3]")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="uniform, dp, greedy or kl.  [default: uniform]")
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="Memory for weights and KV cache, such as 24GiB.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="With --fit: tokens a sequence.  [default: the model's]")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="With --fit: sequences.  [default: 1]")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help=f"{DATA}, to measure on.  [default: made up]", parser=given),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens to measure on.  [default: 16384]")
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            help="File that keeps what is measured.  [default: OUT.scores.json]", parser=given
        ),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="One letter a layer: FSSSF...")] = None,
    full_layers: Annotated[str | None, typer.Option(help="Such as 0,4,8,11.")] = None,
    last_layer_full: Annotated[
        bool | None,
        typer.Option(
            "--last-layer-full/--no-last-layer-full",
            help="With --ratio and --full-layers.  [default: full]",
        ),
    ] = None,
    top_k_tokens: Annotated[
        int | None, typer.Option(help="Tokens that a sparse layer selects.  [default: 1024]")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens in a selected block.  [default: 64]")
    ] = None,
    window_tokens: Annotated[
        int | None, typer.Option(help="Sliding window of a sparse layer.  [default: 128]")
    ] = None,
    rope_theta: Annotated[
        float | None,
        typer.Option(help="New base of the rotary embedding, to heal a longer context."),
    ] = None,
    max_position_embeddings: Annotated[
        int | None, typer.Option(help="New longest input in tokens, to be healed at.")
    ] = None,
    swap_attention: Annotated[
        str | None,
        typer.Option(help="Layers whose attention trades places: 8:9, or auto.  [default: none]"),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="How new layers start: constant, copy or aligned.  [default: constant]"),
    ] = None,
    explain: Annotated[
        bool | None, typer.Option("--explain", help="Measure what each mechanism costs.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file of weights.  [default: 5GB]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: TrustRemoteCode = None,
    overwrite: Overwrite = None,
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
    from hysparse_cli.recipe import (
        ConvertOptions,
        integer_list,
        layer_pairs,
        load_section,
        token_count,
    )

    flags = locals() | {
        "full_layers": integer_list("full_layers", full_layers),
        "context": token_count("context", context),
        "swap_attention": layer_pairs("swap_attention", swap_attention),
    }
    options = load_section(ConvertOptions, recipe, assignments, flags)
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
        show(plan, as_json=False, table=plan_table)
    if plan.runs_the_model and (options.explain or not dry_run):
        with stages() as advance_stage:
            plan = measure(plan, dense, advance_stage)
        if not as_json:
            show(plan.measured, as_json=False, table=measured_table)
    del dense  # its memory is free before weights are written
    if dry_run:
        if as_json:
            show(plan, as_json=True)
        warn(plan.warnings)
        return
    with progress(f"writing {out.name}") as advance:
        conversion = execute(plan, out, advance)
    warn(conversion.warnings)
    show(conversion, as_json, table=conversion_table)
