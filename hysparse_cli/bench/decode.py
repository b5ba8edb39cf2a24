"""Measures decode: one token after another from a cache of random keys and values (TPOT).

The cache is transformers' static one, full to its last slot; each step writes that slot, attends to
all of it and starts over there, so that every step is the same one, at exactly ``context`` tokens.
No prefill is needed. On a GPU the step is one CUDA graph, captured once and replayed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

from hysparse_cli.bench.attention import AttentionPart
from hysparse_cli.bench.timing import Marks
from hysparse_cli.model.kv_cache import KvCache, held_kv_bytes, kv_cache_of

WARM_STEPS = 2


class Window(StaticSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """transformers' sliding window layer, which moves a full window without a tensor from the host:
    that a CUDA graph can't capture."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if key_states.shape[-2] != 1 or self.cumulative_length_int < self.max_cache_len:
            moved: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return moved
        self.cumulative_length_int += 1
        keys, values = self.keys, self.values
        assert keys is not None and values is not None, "initialised early"
        for held, new in ((keys, key_states), (values, value_states)):
            held.copy_(torch.cat([held[:, :, 1:], new], dim=2))
        return keys, values


def static_cache(
    config: Any, context: int, batch: int, dtype: torch.dtype, device: torch.device
) -> StaticCache:
    """transformers' static cache of ``context`` tokens, its memory taken and not filled."""
    heads = kv_cache_of(config)
    cache = StaticCache(config=config, max_cache_len=context)
    for layer in cache.layers:
        if isinstance(layer, StaticSlidingWindowLayer):
            layer.__class__ = Window
    cache.early_initialization(batch, heads.num_kv_heads, heads.head_dim, dtype, device)
    return cache


def static_kv_cache(config: Any) -> KvCache:
    """The arithmetic of ``static_cache``: a window also has a slot for the newest token."""
    cache = kv_cache_of(config)
    return cache.with_windows(tuple(None if w is None else w + 1 for w in cache.windows))


class Decoding:
    """A model ready to decode at ``context`` tokens, the newest one included."""

    def __init__(self, model: Any, context: int, batch: int, seed: int):
        self.model, self.context = model, context
        chance = torch.Generator(model.device).manual_seed(seed)
        self.cache: Any = static_cache(model.config, context, batch, model.dtype, model.device)
        layers: Any = self.cache.layers
        for layer in layers:
            layer.keys.normal_(generator=chance)
            layer.values.normal_(generator=chance)
        shape, vocabulary = (batch, 1), model.config.vocab_size
        self.ids = torch.randint(vocabulary, shape, generator=chance, device=model.device)
        self.rewind()

    @property
    def kv_bytes(self) -> int:
        return held_kv_bytes(self.cache)

    def rewind(self) -> None:
        """Back to where the last slot is next."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context - 1)
            if isinstance(layer, Window):
                layer.cumulative_length_int = self.context - 1

    def step(self) -> None:
        output = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True)
        self.ids.copy_(output.logits[:, -1:].argmax(-1))


@torch.inference_mode()
def decode(
    model: Any, part: AttentionPart, context: int, batch: int, *, steps: int, seed: int
) -> dict[str, Any]:
    """Milliseconds of each of ``steps`` steps, and of their attention calls only; KV bytes held.

    The calls are those of one step, with its queries and the cache's keys and values, made again
    layer after layer. ``part``'s check sees one more step at the end: no later one changes the
    cache, and no graph has what it does in it.
    """
    decoding = Decoding(model, context, batch, seed)
    part.calls, check, part.check = [], part.check, None
    for _ in range(WARM_STEPS):
        part.calls.clear()
        decoding.step()
        decoding.rewind()
    calls, part.calls = part.calls, None
    device = decoding.ids.device
    whole = _each_ms(decoding.step, decoding.rewind, device, steps)
    attention = _each_ms(lambda: part.repeat(calls), lambda: None, device, steps)
    part.check = check
    decoding.step()
    return {"tpots_ms": whole, "attentions_ms": attention, "kv_bytes": decoding.kv_bytes}


def _each_ms(
    work: Callable[[], None], between: Callable[[], None], device: torch.device, steps: int
) -> list[float]:
    """Milliseconds of each ``work``; on a GPU it is captured in a graph first."""
    run = _graph_of(work, between, device) if device.type == "cuda" else work
    marks = Marks(device)
    for _ in range(steps):
        marks.mark()
        run()
        marks.mark()
        between()
    return marks.spans_ms()


def _graph_of(
    work: Callable[[], None], between: Callable[[], None], device: torch.device
) -> Callable[[], None]:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is only loaded or tuned at the first call
        work()
        between()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    between()
    graph.replay()
    between()
    return graph.replay
