"""``hysparse bench``: of a model beside its peers, or of the kernels alone."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hysparse_cli.cli.shared import (
    AsJson,
    Assignments,
    Device,
    Dtype,
    RecipeFile,
    TrustRemoteCode,
    given,
    given_path,
    not_for,
    show,
    write,
)
from hysparse_cli.errors import InvalidRecipe, QualityGateFailed
from hysparse_cli.progress import stages

FORMATS = ("table", "json", "csv", "md")
OF_MODELS = (
    *("config", "random_weights", "ratio", "pattern", "last_layer_full", "subjects", "against"),
    *("phases", "batch", "decode_tokens", "warmup", "repeat", "gradient_checkpointing"),
    "trust_remote_code",
)


def bench(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="A folder or hub id; or kernels: the attention ops by themselves.", parser=given
        ),
    ] = None,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="Instead of a checkpoint: a folder, hub id, paper-7b or paper-80b-a3b, measured "
            "with random weights.",
            parser=given,
        ),
    ] = None,
    random_weights: Annotated[
        bool | None, typer.Option("--random-weights", help="Of a checkpoint, use its config alone.")
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(help="Full to sparse layers of a dense model.  [default: 1:3]")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="One letter a layer: FSSSF...")] = None,
    last_layer_full: Annotated[
        bool | None,
        typer.Option("--last-layer-full/--no-last-layer-full", help="With --ratio."),
    ] = None,
    subjects: Annotated[
        str | None,
        typer.Option(help="Of dense, dense-cudnn, dense-flash, hybrid-swa, hysparse."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another checkpoint to measure beside; may repeat.", parser=given),
    ] = None,
    phases: Annotated[
        str | None, typer.Option(help="Of memory, prefill, decode, train.  [default: not train]")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Lengths in tokens, such as 4k,32k.  [default: 512,2k; kernels: 8k,32k]"),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Sequences at once, such as 1,16.  [default: 1]")
    ] = None,
    decode_tokens: Annotated[
        int | None, typer.Option(help="Steps of decoding in each turn.  [default: 16]")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Turns to warm up.  [default: 1]")] = None,
    repeat: Annotated[int | None, typer.Option(help="Measured turns.  [default: 3]")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="train: compute activations twice."),
    ] = None,
    lists: Annotated[
        str | None,
        typer.Option(
            help="Blocks that sparse layers read: own, local or a file of inspect-topk; kernels: a "
            "file.  [default: own; kernels: made up]",
            parser=given,
        ),
    ] = None,
    ops: Annotated[
        str | None, typer.Option(help="kernels: full,block-sparse,window,layer,decode.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A folder for JSON, CSV and plots; a sweep goes on where it stopped.",
            parser=given_path,
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = None,
    format_: Annotated[
        str, typer.Option("--format", help="What goes to stdout: table, json, csv or md.")
    ] = "table",
    as_json: AsJson = False,
) -> None:
    """Measure memory and speed of a model beside its peers.

    Memory, prefill, decode and training; or the attention kernels by themselves.
    """
    from hysparse_cli.recipe import (
        BenchOptions,
        integer_list,
        load_section,
        name_list,
        token_counts,
    )

    if format_ not in FORMATS:
        raise InvalidRecipe(f"format {format_!r} is unknown; known: {', '.join(FORMATS)}")
    if as_json and format_ not in ("table", "json"):
        raise InvalidRecipe(f"--json and --format {format_} ask for two forms: give one of them")
    flags = locals() | {"context": token_counts("context", context), "against": against or None}
    format_ = "json" if as_json else format_
    if checkpoint == "kernels":
        if format_ == "csv":
            raise InvalidRecipe("bench kernels has no csv: use --format table, json or md")
        _kernels(flags, format_)
        return
    not_for("bench of a model", flags, "ops")
    flags["batch"] = integer_list("batch", batch)
    flags |= {"phases": name_list(phases), "subjects": name_list(subjects)}
    options = load_section(BenchOptions, recipe, assignments, flags)
    from hysparse_cli.bench import run

    with stages() as advance:
        result = run.bench(checkpoint, options, advance, output)
    if format_ in ("csv", "md"):
        write(result.as_csv() if format_ == "csv" else result.markdown())
    else:
        show(result, as_json=format_ == "json")
    _fail(result.failures())


def _kernels(flags: dict[str, Any], format_: str) -> None:
    from hysparse_cli.bench.kernels.run import bench_kernels
    from hysparse_cli.files.output import prepare_results
    from hysparse_cli.recipe import KernelBenchOptions, load_section, name_list

    not_for("bench kernels", flags, *OF_MODELS)
    flags["ops"] = name_list(flags["ops"])
    options = load_section(KernelBenchOptions, flags["recipe"], flags["assignments"], flags)
    output: Path | None = flags["output"]
    if output is not None:
        prepare_results(output, "kernels.json", "hysparse.bench-kernels/", ["kernels.md"])

    def keep(so_far: Any) -> None:
        if output is not None:
            so_far.write(output)

    with stages() as advance:
        found = bench_kernels(options, advance, keep)
    if format_ == "md":
        write(found.markdown())
    else:
        show(found, as_json=format_ == "json")
    _fail(found.failures())


def _fail(failures: list[str]) -> None:
    if failures:
        raise QualityGateFailed("; ".join(failures))
