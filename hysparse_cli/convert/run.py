"""Dense checkpoint in, HySparse checkpoint out: ``plan`` only reads headers, ``execute`` streams.

The weights stay what they are. Sparse layers get new tensors (gates and sinks) in a shard of their
own, config.json says which layers are sparse, and the folder appears when it is whole.
"""

import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hysparse_cli import __version__
from hysparse_cli import pattern as patterns
from hysparse_cli.convert.card import model_card
from hysparse_cli.convert.loadable import Loadable, check_loadable
from hysparse_cli.convert.plan import Plan, contexts_up_to, readable
from hysparse_cli.convert.positions import with_positions
from hysparse_cli.convert.swaps import check_family, check_pairs, exchanged, renamed
from hysparse_cli.errors import InvalidRecipe, UnreadableInput, UnsupportedModel
from hysparse_cli.families import Family, check_rope, family_of
from hysparse_cli.files.checkpoint import (
    FLOATS,
    INDEX,
    SINGLE,
    Checkpoint,
    copy_side_files,
    open_checkpoint,
    read_config,
    side_files,
)
from hysparse_cli.files.config_json import without_switches
from hysparse_cli.files.foreign import check_code
from hysparse_cli.files.output import require_free_space, staged
from hysparse_cli.files.provenance import provenance
from hysparse_cli.files.source import Source
from hysparse_cli.model.config import (
    HUB_SHIM,
    HUB_SHIM_NAME,
    MODEL_TYPE,
    HysparseSpec,
    NewTensor,
    converted_config,
    new_tensors,
)
from hysparse_cli.model.kv_cache import KvCache, kv_cache_of
from hysparse_cli.pattern import Pattern
from hysparse_cli.placement.budget import Fit, most_full_layers
from hysparse_cli.placement.result import Selection, Swaps
from hysparse_cli.printable import printable
from hysparse_cli.recipe import ConvertOptions, bytes_of, to_yaml

DEFAULT_RATIO = "1:3"
# what a pattern stands for once it is chosen, and what chose it
_PLACEMENT = ("ratio", "full_layers", "strategy", "fit", "context", "batch", "scores")
RECIPE_NAME, REPORT_NAME = "hysparse_recipe.yaml", "hysparse_report.json"
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """A finished conversion. ``non_finite``: tensor -> how many of its values are NaN or infinite.

    ``source_files``: what identifies each file that was read (see provenance.py). ``loadable``:
    what loading it showed (see loadable.py).
    """

    plan: Plan
    out: Path
    files: dict[str, int]
    source_files: dict[str, dict[str, Any]]
    non_finite: dict[str, int]
    seconds: float
    loadable: Loadable

    @property
    def warnings(self) -> list[str]:
        found = [*self.plan.warnings, *self.loadable.warnings]
        if self.non_finite:
            name, count = next(iter(self.non_finite.items()))
            found.append(
                f"{len(self.non_finite)} tensors hold NaN or infinity, such as {printable(name)} "
                f"({count} values): the model will not work"
            )
        return found

    def table(self) -> Any:
        """What was written, in a line."""
        from rich.text import Text

        written = f"{readable(sum(self.files.values()))} in {len(self.files)} shards"
        return Text(f"{self.out}: {written}, {self.seconds:.1f} s")

    def as_json(self) -> dict[str, Any]:
        """The report: the plan, what was written, and from what."""
        packages = ("torch", "transformers", "safetensors")
        versions = {"python": platform.python_version(), "hysparse": __version__}
        return {
            "schema": "hysparse.convert/1",
            "plan": self.plan.as_json(),
            "out": str(self.out),
            "files": self.files,
            "source_files": self.source_files,
            "non_finite": self.non_finite,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
            "versions": versions | {p: version(p) for p in packages},
        }


def plan(
    source: Source,
    options: ConvertOptions,
    selection: Selection | None = None,
    swaps: Swaps | None = None,
) -> Plan:
    """Read config and headers of ``source``, check everything, and say what would be done.

    Args:
        selection: what a strategy that measures has chosen; without it the uniform pattern stands
            in for such a strategy.
        swaps: what ``swap_attention: auto`` has chosen; without it nothing is swapped for that.
    Raises: UnreadableInput, UnsupportedModel or InvalidRecipe, each with its one reason.
    """
    check_code(source.folder, trust_remote_code=options.trust_remote_code)
    config = read_config(source.folder)
    where = str(source.folder / "config.json")
    family = _family(config, where, source)
    if options.swap_attention is not None:
        check_family(family, config["model_type"])
    # transformers takes seconds to import: what can be refused without it was refused above
    from hysparse_cli.convert.shapes import (
        check_forward,
        check_tensors,
        dense_config,
        expected_tensors,
    )

    checkpoint = open_checkpoint(source.folder)
    config = without_switches(config)
    dense = dense_config(config, where)
    check_rope(getattr(dense, "rope_parameters", None))
    dense_kv = kv_cache_of(dense)
    dtype = _dtype(checkpoint, options)
    itemsize = 4 if dtype == "float32" else 2
    fit = None
    if options.fit is not None:
        fit = _fit(options, dense, checkpoint, dense_kv, itemsize)
    if swaps is None and isinstance(options.swap_attention, list):
        swaps = Swaps(tuple((a, b) for a, b in options.swap_attention), None)
    pairs = swaps.pairs if swaps else ()
    check_pairs(pairs, dense.num_hidden_layers)
    spec = _spec(options, _layout(options, dense.num_hidden_layers, fit, selection), pairs)
    expected = expected_tensors(dense, where)
    unused = check_tensors(checkpoint, expected)
    check_forward(expected.model, where)
    own_sinks = f"{family.attention.format(layer=0)}.sinks" in expected.shapes
    added = new_tensors(dense.num_attention_heads, dense.hidden_size, spec, own_sinks=own_sinks)
    by_layer = tuple(_names(added, family, spec, layer) for layer in range(len(spec.pattern)))
    return Plan(
        source=source,
        checkpoint=checkpoint,
        options=options.model_copy(
            update=dict.fromkeys(_PLACEMENT)
            | {"pattern": spec.pattern, "swap_attention": [list(pair) for pair in pairs] or None}
        ),
        spec=spec,
        config=_new_config(config, dense, spec, options),
        new_tensors={name: tensor for names in by_layer for name, tensor in names.items()},
        new_by_layer=tuple(tuple(names) for names in by_layer),
        dtype=dtype,
        itemsize=itemsize,
        repack=_must_repack(checkpoint, options),
        unused=tuple(unused),
        dense_kv=dense_kv,
        kv=dense_kv.with_windows(
            spec.cache_windows if spec.layers.sparse_layers else exchanged(dense_kv.windows, pairs)
        ),
        contexts=contexts_up_to(
            options.max_position_embeddings or getattr(dense, "max_position_embeddings", None)
        ),
        fit=fit,
        selection=selection,
        swaps=swaps,
        renamed=renamed(checkpoint.tensors, pairs, family),
    )


def execute(plan: Plan, out: Path, on_progress: OnProgress) -> Conversion:
    """Carry out ``plan``: ``out`` is absent, or what it was, until all of it is on the disk.

    Args:
        on_progress: is told bytes done and bytes in all.
    Raises: InvalidRecipe where ``out`` may not be written; OutOfResources where the disk is full;
        UnreadableInput where what would be written could not be loaded.
    """
    from hysparse_cli.convert.weights import write_weights

    start = time.monotonic()
    folder, options = plan.checkpoint.folder, plan.options
    with staged(out, overwrite=options.overwrite, inputs=[folder]) as partial:
        require_free_space(out, plan.output_bytes)
        copy_side_files(folder, partial, with_code=options.trust_remote_code)
        _write_json(partial / "config.json", plan.config)
        (partial / HUB_SHIM_NAME).write_text(HUB_SHIM, encoding="utf-8")
        loadable = check_loadable(partial, folder, with_code=options.trust_remote_code)
        written = write_weights(plan, partial, on_progress)
        if list(written.files) != [SINGLE]:
            _write_json(partial / INDEX, written.index)
        (partial / RECIPE_NAME).write_text(to_yaml(options), encoding="utf-8")
        (partial / "README.md").write_text(model_card(plan), encoding="utf-8")
        conversion = Conversion(
            plan=plan,
            out=out,
            files=written.files,
            source_files=provenance(
                plan.checkpoint, side_files(folder, with_code=options.trust_remote_code)
            ),
            non_finite=written.non_finite,
            seconds=time.monotonic() - start,
            loadable=loadable,
        )
        _write_json(partial / REPORT_NAME, conversion.as_json())
    return conversion


def _family(config: Mapping[str, Any], where: str, source: Source) -> Family:
    model_type = config.get("model_type")
    if model_type == MODEL_TYPE or "hysparse" in config:
        raise UnsupportedModel(
            f"{printable(source.name)} is already a HySparse checkpoint: convert the dense "
            "one it came from"
        )
    if not isinstance(model_type, str):
        raise UnreadableInput(f"{where} has no model_type: give a Hugging Face checkpoint")
    return family_of(model_type)


def _spec(
    options: ConvertOptions, chosen: Pattern, swapped: tuple[tuple[int, int], ...]
) -> HysparseSpec:
    return HysparseSpec(
        pattern=chosen.pattern,
        layout=options.layout,
        block_size=options.block_size,
        top_k_tokens=options.top_k_tokens,
        window_tokens=options.window_tokens,
        sparse_kv=options.sparse_kv,
        window_kv=options.window_kv,
        swapped=swapped,
    )


def _fit(
    options: ConvertOptions,
    dense: Any,
    checkpoint: Checkpoint,
    dense_kv: KvCache,
    itemsize: int,
) -> Fit:
    """The most full layers that fit ``options.fit``; the gates and sinks are not worth counting."""
    assert options.fit is not None
    num_layers = dense.num_hidden_layers
    context = options.context or dense.max_position_embeddings
    weights = checkpoint.size
    if options.dtype != "auto":
        weights = itemsize * sum(math.prod(t.shape) for t in checkpoint.tensors.values())

    def kv_bytes(num_full: int) -> int:
        windows = (None,) * num_full + (options.window_tokens,) * (num_layers - num_full)
        return dense_kv.with_windows(windows).total_bytes(context, itemsize)

    return most_full_layers(
        budget_bytes=bytes_of(options.fit),
        weight_bytes=weights,
        kv_bytes=kv_bytes,
        context=context,
        batch=options.batch or 1,
        num_layers=num_layers,
    )


def _layout(
    options: ConvertOptions, num_layers: int, fit: Fit | None, selection: Selection | None
) -> Pattern:
    last = options.last_layer_full
    if selection is not None:
        chosen = Pattern(selection.pattern)
    elif fit is not None:
        chosen = patterns.uniform(fit.num_full, num_layers)
    elif options.pattern is not None:
        chosen = patterns.from_pattern(options.pattern, num_layers)
    elif options.full_layers is not None:
        chosen = patterns.from_full_layers(options.full_layers, num_layers, last_layer_full=last)
    elif options.layout == "full" and options.ratio is None:
        chosen = Pattern(patterns.FULL * num_layers)
    else:
        chosen = patterns.from_ratio(
            options.ratio or DEFAULT_RATIO, num_layers, last_layer_full=last
        )
    if options.layout == "full" and chosen.sparse_layers:
        raise InvalidRecipe(
            f"layout full has no sparse layers, but the pattern is {chosen.pattern}: leave the "
            "pattern out, or choose layout hysparse or hybrid-swa"
        )
    return chosen


def _dtype(checkpoint: Checkpoint, options: ConvertOptions) -> str:
    """The name of the dtype that most float weights will have."""
    integers = {"I64", "I32", "I16", "I8", "U8", "BOOL"}
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in FLOATS:
            sizes[FLOATS[tensor.dtype]] += tensor.size
        elif tensor.dtype not in integers:
            raise UnsupportedModel(
                f"{tensor.shard}: tensor {printable(tensor.name)} is {tensor.dtype}: give the "
                "checkpoint in bfloat16, float16 or float32"
            )
    if not sizes:
        raise UnreadableInput(f"{checkpoint.folder} holds no float weights")
    return sizes.most_common(1)[0][0] if options.dtype == "auto" else options.dtype


def _must_repack(checkpoint: Checkpoint, options: ConvertOptions) -> bool:
    limit = bytes_of(options.max_shard_size)
    return options.dtype != "auto" or any(shard.size > limit for shard in checkpoint.shards)


def _names(
    added: Mapping[str, NewTensor], family: Family, spec: HysparseSpec, layer: int
) -> dict[str, NewTensor]:
    if layer not in spec.layers.sparse_layers:
        return {}
    path = family.attention.format(layer=layer)
    return {f"{path}.{name}": tensor for name, tensor in added.items()}


def _new_config(
    config: dict[str, Any], dense: Any, spec: HysparseSpec, options: ConvertOptions
) -> dict[str, Any]:
    new = converted_config(with_positions(config, options), spec)
    kinds = getattr(dense, "layer_types", None)
    if not spec.layers.sparse_layers and spec.swapped and kinds is not None:
        new["layer_types"] = list(exchanged(kinds, spec.swapped))  # a window goes where it went
    if options.dtype != "auto":
        new.pop("torch_dtype", None)
        new["dtype"] = options.dtype
    return new


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
