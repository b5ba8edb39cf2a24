"""Counts the bytes of keys and values that a model holds, by the paper's arithmetic.

A full attention layer holds every token; a layer with a window of w tokens, the last w - 1: the
next query brings its own key. (transformers' static cache allocates that one too.)
"""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class KvCache:
    """``windows[layer]`` is the layer's sliding window in tokens, or None where it has none."""

    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    def layer_bytes(self, layer: int, context_tokens: int, itemsize: int) -> int:
        """Bytes of keys and values that ``layer`` holds for one sequence of ``context_tokens``."""
        window = self.windows[layer]
        kept = context_tokens if window is None else min(context_tokens, window - 1)
        return 2 * kept * self.num_kv_heads * self.head_dim * itemsize

    def total_bytes(self, context_tokens: int, itemsize: int) -> int:
        """Bytes of keys and values that all layers hold for one sequence of ``context_tokens``."""
        layers = range(len(self.windows))
        return sum(self.layer_bytes(layer, context_tokens, itemsize) for layer in layers)

    def with_windows(self, windows: tuple[int | None, ...]) -> "KvCache":
        """The same heads with other windows."""
        return replace(self, windows=windows)


def kv_cache_of(config: Any) -> KvCache:
    """The cache of a transformers config, dense or converted, as ``generate()`` would build it."""
    heads = config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    return KvCache(
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
    )


def held_kv_bytes(cache: Any) -> int:
    """Bytes of memory that the keys and values of a transformers Cache keep alive.

    Whole storages count: a short window that is a view of a long prefill keeps all of it. Memory
    that tensors share counts once.
    """
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
