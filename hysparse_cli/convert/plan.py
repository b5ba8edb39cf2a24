"""What ``hysparse convert`` is about to do, for people and for programs."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hysparse_cli.convert.swaps import exchanged
from hysparse_cli.files.checkpoint import Checkpoint
from hysparse_cli.files.source import Source
from hysparse_cli.model.config import HysparseSpec, NewTensor
from hysparse_cli.model.kv_cache import KvCache
from hysparse_cli.placement.budget import Fit
from hysparse_cli.placement.result import Selection, Swaps
from hysparse_cli.printable import printable
from hysparse_cli.recipe import ConvertOptions

if TYPE_CHECKING:
    from hysparse_cli.convert.measure import Measured

CONTEXTS = (8192, 32768, 131072)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Plan:
    """A validated conversion.

    ``config`` is the new config.json. ``new_tensors`` has full names. ``dtype`` is torch's name of
    the dtype of the new tensors and the cache. ``repack`` says that weights are written anew, not
    copied shard by shard. ``unused`` tensors are kept although transformers will not load them.
    ``contexts``: lengths in tokens at which people are told what the KV cache comes to.
    ``renamed``: stored tensors that get another layer's name, as ``swaps`` say.
    ``measured``: what running the dense model gave (see measure.py), or None.
    """

    source: Source
    checkpoint: Checkpoint
    options: ConvertOptions
    spec: HysparseSpec
    config: dict[str, Any]
    new_tensors: dict[str, NewTensor]
    new_by_layer: tuple[tuple[str, ...], ...]
    dtype: str
    itemsize: int
    repack: bool
    unused: tuple[str, ...]
    dense_kv: KvCache
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
    def start_is_measured(self) -> bool:
        """Whether the new tensors are fitted: without two branches there are no gates to fit."""
        gated = self.spec.kind.gate is not None and bool(self.spec.layers.sparse_layers)
        return self.options.init != "constant" and gated

    @property
    def runs_the_model(self) -> bool:
        """Whether the dense model is to be loaded and run (see measure.py)."""
        explains = self.options.explain and bool(self.spec.layers.sparse_layers)
        return explains or self.start_is_measured

    @property
    def output_bytes(self) -> int:
        """About how large the weights to be written are."""
        new = sum(math.prod(tensor.shape) * self.itemsize for tensor in self.new_tensors.values())
        if self.options.dtype == "auto":
            return self.checkpoint.size + new
        stored = self.checkpoint.tensors.values()
        return new + sum(math.prod(tensor.shape) * self.itemsize for tensor in stored)

    def role(self, layer: int) -> str:
        """What ``layer`` does and who serves whom, in words."""
        if layer in self.spec.layers.full_layers:
            served = self.spec.layers.served_by(layer)
            return f"full, serves {_span(served)}" if served and self._shares else "full"
        if not self._shares:
            return "sliding window"
        return f"sparse, from {self.spec.layers.server_of(layer)}"

    @property
    def _title(self) -> str:
        return f"{printable(self.source.name)}: {self.spec.layout}, {self.spec.pattern}"

    @property
    def _shares(self) -> bool:
        return self.spec.selects

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
        if self.unused:
            found.append(
                f"{len(self.unused)} tensors are kept but transformers will not load them, such "
                f"as {printable(self.unused[0])}"
            )
        return found

    @property
    def widened(self) -> tuple[int, ...]:
        """Full layers whose attention has a sliding window in the dense model."""
        before = exchanged(self.dense_kv.windows, self.spec.swapped)
        after, full = self.kv.windows, self.spec.layers.full_layers
        return tuple(i for i in full if before[i] is not None and after[i] is None)

    def table(self) -> Any:
        """A row a layer, and the KV cache in total against the dense model's."""
        from hysparse_cli.tables import Table

        chosen = (self.fit, self.selection, self.swaps)
        table = Table(
            title=self._title,
            title_justify="left",
            title_style="bold",
            caption="\n".join(part.line() for part in chosen if part),
            caption_justify="left",
        )
        table.add_column("layer", justify="right")
        table.add_column("role")
        table.add_column("new tensors")
        for context in self.contexts:
            table.add_column(f"KV {context_name(context)}", justify="right", no_wrap=True)
        for layer in range(self.num_layers):
            kv = [readable(self.kv.layer_bytes(layer, c, self.itemsize)) for c in self.contexts]
            added = dict.fromkeys(_kind(name) for name in self.new_by_layer[layer])
            table.add_row(str(layer), self.role(layer), ", ".join(added) or "—", *kv)
        table.add_section()
        totals, dense = self._totals(self.kv), self._totals(self.dense_kv)
        table.add_row("", "all layers", f"{len(self.new_tensors)} tensors", *map(readable, totals))
        table.add_row("", "dense model", "", *map(readable, dense))
        ratios = [f"{d / t:.2f}x" for t, d in zip(totals, dense, strict=True)]
        table.add_row("", "smaller by", "", *ratios, style="bold")
        return table

    def as_json(self) -> dict[str, Any]:
        """The plan as one JSON object."""
        layers = [
            {
                "layer": layer,
                "role": self.spec.pattern[layer],
                "served_by": self._server(layer),
                "new_tensors": {n: list(self.new_tensors[n].shape) for n in names},
                "kv_bytes": {
                    str(c): self.kv.layer_bytes(layer, c, self.itemsize) for c in self.contexts
                },
            }
            for layer, names in enumerate(self.new_by_layer)
        ]
        keys = [str(context) for context in self.contexts]
        return {
            "schema": "hysparse.plan/1",
            "model": self.source.name,
            "revision": self.source.revision,
            "base_model_type": self.config["base_model_type"],
            "hysparse": self.config["hysparse"],
            "dtype": self.dtype,
            "weights": "written anew" if self.repack else "copied byte for byte",
            "source_bytes": self.checkpoint.size,
            "layers": layers,
            "kv_bytes": dict(zip(keys, self._totals(self.kv), strict=True)),
            "dense_kv_bytes": dict(zip(keys, self._totals(self.dense_kv), strict=True)),
            "fit": self.fit and self.fit.as_json(),
            "selection": self.selection and self.selection.as_json(),
            "swaps": self.swaps and self.swaps.as_json(),
            **(self.measured.as_json() if self.measured else {}),
            "warnings": self.warnings,
        }

    def _server(self, layer: int) -> int | None:
        server = self.spec.layers.server_of(layer)
        return server if self._shares and server != layer else None

    def _totals(self, kv: KvCache) -> list[int]:
        return [kv.total_bytes(context, self.itemsize) for context in self.contexts]


def contexts_up_to(longest: int | None) -> tuple[int, ...]:
    """Those of ``CONTEXTS`` that a model reads, and the ``longest`` that it does, if known."""
    if longest is None:
        return CONTEXTS
    return (*(context for context in CONTEXTS if context < longest), longest)


def context_name(tokens: int) -> str:
    """``8k`` for 8192."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def readable(count: int) -> str:
    """Bytes for people, in powers of 1024: ``1.5 MiB``."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return (
        f"{value:.0f} {_UNITS[unit]}" if value >= 100 or not unit else f"{value:.3g} {_UNITS[unit]}"
    )


def _kind(name: str) -> str:
    """``gate`` for ``model.layers.1.self_attn.hysparse.gate.weight``."""
    return name.partition(".hysparse.")[2].partition(".")[0]


def _span(layers: tuple[int, ...]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
