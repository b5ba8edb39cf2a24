"""``hysparse bench``: of a checkpoint, or of the kernels alone."""

from pathlib import Path
from typing import Annotated

import typer

from hysparse_cli.cli.shared import AsJson, Assignments, Device, Dtype, RecipeFile, not_for, show
from hysparse_cli.errors import QualityGateFailed
from hysparse_cli.progress import stages


def bench(
    checkpoint: Annotated[
        str, typer.Argument(help="A folder or hub id; or kernels: the attention ops by themselves.")
    ],
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Another checkpoint to measure beside; may repeat.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Prompt lengths in tokens.  [default: 512,2048; kernels: 8k,32k]"),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Sequences at once, such as 1,16.  [default: 1]")
    ] = None,
    decode_tokens: Annotated[
        int | None, typer.Option(help="Tokens to decode after each prompt.  [default: 16]")
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(help="Measured turns, after one to warm up.  [default: 3]")
    ] = None,
    lists: Annotated[
        str | None, typer.Option(help="kernels: a file of inspect-topk.  [default: made up]")
    ] = None,
    ops: Annotated[
        str | None, typer.Option(help="kernels: full,block-sparse,window,layer,decode.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="kernels: a folder for kernels.json and kernels.md.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure KV cache bytes, time to first token and time per token; or the kernels."""
    from hysparse_cli.recipe import (
        BenchOptions,
        KernelBenchOptions,
        integer_list,
        load_section,
        token_counts,
    )

    flags = locals() | {"context": token_counts("context", context), "against": against or None}
    if checkpoint == "kernels":
        not_for("bench kernels", flags, "against", "batch", "decode_tokens", "repeat")
        flags["ops"] = ops.split(",") if ops else None
        kernel_options = load_section(KernelBenchOptions, recipe, assignments, flags)
        from hysparse_cli.bench.kernels.run import bench_kernels

        with stages() as advance:
            keep = (lambda so_far: so_far.write(output)) if output else (lambda so_far: None)
            found = bench_kernels(kernel_options, advance, keep)
        show(found, as_json)
        if found.failures():
            raise QualityGateFailed("; ".join(found.failures()))
        return
    not_for("bench of a checkpoint", flags, "lists", "ops", "output")
    flags["batch"] = integer_list("batch", batch)
    options = load_section(BenchOptions, recipe, assignments, flags)
    from hysparse_cli.bench import run

    with stages() as advance:
        result = run.bench(checkpoint, options, advance)
    show(result, as_json)
