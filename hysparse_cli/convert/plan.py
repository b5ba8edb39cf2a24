"""Plans a conversion: a dense checkpoint's config and headers and the options in, a Plan out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hysparse_cli import pattern as patterns
from hysparse_cli.convert.dense import DenseCheckpoint
from hysparse_cli.convert.positions import with_positions
from hysparse_cli.convert.swaps import check_family, check_pairs, exchanged, renamed
from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.model.config import HysparseSpec, NewTensor, converted_config, new_tensors
from hysparse_cli.model.kv_cache import KvCache
from hysparse_cli.pattern import Pattern
from hysparse_cli.placement.budget import Fit, most_full_layers
from hysparse_cli.placement.result import Selection, Swaps
from hysparse_cli.printable import printable
from hysparse_cli.recipe import ConvertOptions, bytes_of

if TYPE_CHECKING:
    from hysparse_cli.convert.decide import Measured

CONTEXTS = (8192, 32768, 131072)
DEFAULT_RATIO = "1:3"
ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes
# what a pattern stands for once it is chosen, and what chose it
_PLACEMENT = ("ratio", "full_layers", "strategy", "fit", "context", "batch", "scores")


@dataclass(frozen=True)
class Plan:
    """A validated conversion.

    ``options`` say the pattern and the swaps that were chosen, and not what chose them. ``config``
    is the new config.json. ``new_by_layer`` has full names. ``dtype`` is torch's name of the dtype
    of the new tensors and the cache. ``repack`` says that weights are written anew, not copied
    shard by shard. ``contexts``: lengths in tokens at which people are told what the KV cache comes
    to. ``renamed``: stored tensors that get another layer's name, as ``swaps`` say. ``measured``:
    what running the dense model gave (see decide.py), or None.
    """

    dense: DenseCheckpoint
    options: ConvertOptions
    spec: HysparseSpec
    config: dict[str, Any]
    new_by_layer: tuple[dict[str, NewTensor], ...]
    dtype: str
    repack: bool
    kv: KvCache
    contexts: tuple[int, ...]
    fit: Fit | None
    selection: Selection | None
    swaps: Swaps | None
    renamed: dict[str, str]
    measured: "Measured | None" = None

    @property
    def num_layers(self) -> int:
        return len(self.spec.pattern)

    @property
    def new_tensors(self) -> dict[str, NewTensor]:
        return {name: tensor for layer in self.new_by_layer for name, tensor in layer.items()}

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def start_is_measured(self) -> bool:
        """Whether the new tensors are fitted: without two branches there are no gates to fit."""
        gated = self.spec.kind.gate is not None and bool(self.spec.layers.sparse_layers)
        return self.options.init != "constant" and gated

    @property
    def runs_the_model(self) -> bool:
        """Whether the planned start, or its damage, is measured on the dense model."""
        explains = self.options.explain and bool(self.spec.layers.sparse_layers)
        return explains or self.start_is_measured

    @property
    def output_bytes(self) -> int:
        """About how large the weights to be written are."""
        new = sum(math.prod(tensor.shape) * self.itemsize for tensor in self.new_tensors.values())
        return new + _weight_bytes(self.dense, self.options)

    @property
    def widened(self) -> tuple[int, ...]:
        """Full layers whose attention has a sliding window in the dense model."""
        before = exchanged(self.dense.kv.windows, self.spec.swapped)
        after, full = self.kv.windows, self.spec.layers.full_layers
        return tuple(i for i in full if before[i] is not None and after[i] is None)

    @property
    def warnings(self) -> list[str]:
        found = []
        if self.widened:
            layers = ", ".join(map(str, self.widened))
            found.append(
                f"full layers that see a sliding window only in the dense model: {layers}; they "
                "attend to everything now, which longer contexts need healing for"
            )
        longest = self.config.get("max_position_embeddings")
        if self.fit is not None and longest is not None and self.fit.context > longest:
            found.append(
                f"context {self.fit.context} is more than the {longest} tokens that the dense "
                "model reads"
            )
        if unused := self.dense.unused:
            found.append(
                f"{len(unused)} tensors are kept but transformers will not load them, such as "
                f"{printable(unused[0])}"
            )
        return found

    def total_kv_bytes(self, kv: KvCache) -> list[int]:
        """Bytes of all layers' keys and values in ``kv``, for one sequence of each context."""
        return [kv.total_bytes(context, self.itemsize) for context in self.contexts]

    def as_json(self) -> dict[str, Any]:
        """The plan as one JSON object."""
        layers = [
            {
                "layer": layer,
                "role": self.spec.pattern[layer],
                "served_by": self._server(layer),
                "new_tensors": {name: list(tensor.shape) for name, tensor in added.items()},
                "kv_bytes": {
                    str(c): self.kv.layer_bytes(layer, c, self.itemsize) for c in self.contexts
                },
            }
            for layer, added in enumerate(self.new_by_layer)
        ]
        keys = [str(context) for context in self.contexts]
        dense = self.dense
        return {
            "schema": "hysparse.plan/1",
            "model": dense.source.name,
            "revision": dense.source.revision,
            "base_model_type": self.config["base_model_type"],
            "hysparse": self.config["hysparse"],
            "dtype": self.dtype,
            "weights": "written anew" if self.repack else "copied byte for byte",
            "source_bytes": dense.checkpoint.size,
            "layers": layers,
            "kv_bytes": dict(zip(keys, self.total_kv_bytes(self.kv), strict=True)),
            "dense_kv_bytes": dict(zip(keys, self.total_kv_bytes(dense.kv), strict=True)),
            "fit": self.fit and self.fit.as_json(),
            "selection": self.selection and self.selection.as_json(),
            "swaps": self.swaps and self.swaps.as_json(),
            **(self.measured.as_json() if self.measured else {}),
            "warnings": self.warnings,
        }

    def _server(self, layer: int) -> int | None:
        server = self.spec.layers.server_of(layer)
        return server if self.spec.selects and server != layer else None


def plan(
    dense: DenseCheckpoint,
    options: ConvertOptions,
    selection: Selection | None = None,
    swaps: Swaps | None = None,
) -> Plan:
    """Say what converting ``dense`` by ``options`` would do.

    Args:
        selection: what a strategy that measures has chosen; without it the uniform pattern stands
            in for such a strategy.
        swaps: what ``swap_attention: auto`` has chosen; without it nothing is swapped for that.
    Raises: UnsupportedModel or InvalidRecipe, with the one reason.
    """
    if options.swap_attention is not None:
        check_family(dense.family, dense.config["model_type"])
    dtype = dense.dtype if options.dtype == "auto" else options.dtype
    fit = None if options.fit is None else _fit(options, dense, ITEMSIZES[dtype])
    if swaps is None and isinstance(options.swap_attention, list):
        swaps = Swaps(tuple((a, b) for a, b in options.swap_attention), None)
    pairs = swaps.pairs if swaps else ()
    check_pairs(pairs, dense.num_layers)
    spec = HysparseSpec(
        pattern=_pattern(options, dense.num_layers, fit, selection).pattern,
        layout=options.layout,
        block_size=options.block_size,
        top_k_tokens=options.top_k_tokens,
        window_tokens=options.window_tokens,
        sparse_kv=options.sparse_kv,
        window_kv=options.window_kv,
        swapped=pairs,
    )
    windows = (
        spec.cache_windows if spec.layers.sparse_layers else exchanged(dense.kv.windows, pairs)
    )
    chosen = {"pattern": spec.pattern, "swap_attention": [list(pair) for pair in pairs] or None}
    return Plan(
        dense=dense,
        options=options.model_copy(update=dict.fromkeys(_PLACEMENT) | chosen),
        spec=spec,
        config=_new_config(dense, spec, options),
        new_by_layer=_new_by_layer(dense, spec),
        dtype=dtype,
        repack=_must_repack(dense, options),
        kv=dense.kv.with_windows(windows),
        contexts=contexts_up_to(options.max_position_embeddings or dense.longest),
        fit=fit,
        selection=selection,
        swaps=swaps,
        renamed=renamed(dense.checkpoint.tensors, pairs, dense.family),
    )


def contexts_up_to(longest: int | None) -> tuple[int, ...]:
    """Those of ``CONTEXTS`` that a model reads, and the ``longest`` that it does, if known."""
    if longest is None:
        return CONTEXTS
    return (*(context for context in CONTEXTS if context < longest), longest)


def _fit(options: ConvertOptions, dense: DenseCheckpoint, itemsize: int) -> Fit:
    """The most full layers that fit ``options.fit``; the gates and sinks are not worth counting."""
    assert options.fit is not None
    context = options.context or dense.model_config.max_position_embeddings

    def kv_bytes(num_full: int) -> int:
        windows = (None,) * num_full + (options.window_tokens,) * (dense.num_layers - num_full)
        return dense.kv.with_windows(windows).total_bytes(context, itemsize)

    return most_full_layers(
        budget_bytes=bytes_of(options.fit),
        weight_bytes=_weight_bytes(dense, options),
        kv_bytes=kv_bytes,
        context=context,
        batch=options.batch or 1,
        num_layers=dense.num_layers,
    )


def _pattern(
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
        chosen = patterns.uniform(num_layers, num_layers)
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


def _weight_bytes(dense: DenseCheckpoint, options: ConvertOptions) -> int:
    """Bytes of the dense model's weights in the dtype that ``options`` ask for."""
    if options.dtype == "auto":
        return dense.checkpoint.size
    stored = dense.checkpoint.tensors.values()
    return ITEMSIZES[options.dtype] * sum(math.prod(tensor.shape) for tensor in stored)


def _must_repack(dense: DenseCheckpoint, options: ConvertOptions) -> bool:
    limit = bytes_of(options.max_shard_size)
    return options.dtype != "auto" or any(shard.size > limit for shard in dense.checkpoint.shards)


def _new_by_layer(dense: DenseCheckpoint, spec: HysparseSpec) -> tuple[dict[str, NewTensor], ...]:
    """The new tensors of each layer, by full name: none in a full one."""
    config, path = dense.model_config, dense.family.attention
    added: Mapping[str, NewTensor] = new_tensors(
        config.num_attention_heads, config.hidden_size, spec, own_sinks=dense.own_sinks
    )
    sparse = spec.layers.sparse_layers
    return tuple(
        {f"{path.format(layer=layer)}.{name}": tensor for name, tensor in added.items()}
        if layer in sparse
        else {}
        for layer in range(dense.num_layers)
    )


def _new_config(
    dense: DenseCheckpoint, spec: HysparseSpec, options: ConvertOptions
) -> dict[str, Any]:
    new = converted_config(with_positions(dense.config, options), spec)
    kinds = getattr(dense.model_config, "layer_types", None)
    if not spec.layers.sparse_layers and spec.swapped and kinds is not None:
        new["layer_types"] = list(exchanged(kinds, spec.swapped))  # a window goes where it went
    if options.dtype != "auto":
        new.pop("torch_dtype", None)
        new["dtype"] = options.dtype
    return new
