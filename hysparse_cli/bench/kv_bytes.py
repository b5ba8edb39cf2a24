"""KV bytes: what the cache of a real prefill holds on to."""

from typing import Any


def allocated_kv_bytes(cache: Any) -> int:
    """Bytes of memory that the keys and values of a transformers Cache keep alive.

    Whole storages count: a short window that is a view of a long prefill keeps all of it.
    """
    held = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())
