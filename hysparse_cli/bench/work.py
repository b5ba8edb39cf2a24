"""Counts what a measurement must do at the least: floating-point operations, bytes to be moved.

Counted for the algorithm that a subject runs, not for a dense one in its place: a sparse layer is
held against its own few keys. Norms, rotations and softmax count nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hysparse_cli.model.config import HysparseSpec, spec_of
from hysparse_cli.model.kv_cache import kv_cache_of

# matrix multiplications of a backward, to one of the forward
LINEAR_BACKWARD = 2
ATTENTION_BACKWARD = 2.5  # five, to two


@dataclass(frozen=True)
class Work:
    """flops: multiplications and additions. moved: bytes read and written, each once."""

    flops: float
    moved: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.moved + other.moved)

    def floor_ms(self, flops_per_second: float, bytes_per_second: float) -> float:
        """No less time than this, on a machine that does so much in a second."""
        return 1e3 * max(self.flops / flops_per_second, self.moved / bytes_per_second)


class ModelSizes:
    """A model's sizes, as work is counted from them.

    Args:
        model: may be on the meta device.
    """

    def __init__(self, model: Any):
        config = model.config
        cache = kv_cache_of(config)
        self.heads, self.kv_heads = config.num_attention_heads, cache.num_kv_heads
        self.head_dim, self.itemsize = cache.head_dim, model.dtype.itemsize
        self.reach = list(_reach(spec_of(config), cache.windows))
        self.head = config.vocab_size * config.hidden_size
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        experts = [p.numel() for p in model.parameters() if p.dim() == 3]
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        embeddings = model.get_input_embeddings().weight.numel()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        # of the layers only
        self.matrices = matrices - embeddings - (0 if tied else self.head)
        self.experts = sum(experts)
        self.num_experts = next((p.shape[0] for p in model.parameters() if p.dim() == 3), 1)
        self.experts_each = getattr(config, "num_experts_per_tok", None) or 1

    def linear(self, tokens: int, predicted: int) -> Work:
        """The layers' matrices over ``tokens``, and the head over ``predicted`` of them."""
        share = self.experts_each / self.num_experts
        flops = 2 * (self.matrices + share * self.experts) * tokens + 2 * self.head * predicted
        read = self.matrices + min(1.0, share * tokens) * self.experts + self.head
        return Work(flops, self.itemsize * read)

    def prefill_attention(self, tokens: int, batch: int) -> Work:
        """Every layer's attention over whole sequences: q, k, v in, o out."""
        pairs = sum(causal_pairs(tokens, limit) for layer in self.reach for limit in layer)
        rows = len(self.reach) * 2 * tokens * (self.heads + self.kv_heads)
        return Work(
            4.0 * batch * self.heads * self.head_dim * pairs,
            self.itemsize * batch * self.head_dim * rows,
        )

    def decode_attention(self, context: int, batch: int) -> Work:
        """Every layer's attention of one new token: the keys and values that it reads."""
        keys = sum(_seen(context, limit) for layer in self.reach for limit in layer)
        return Work(
            4.0 * batch * self.heads * self.head_dim * keys,
            2.0 * self.itemsize * batch * self.kv_heads * self.head_dim * keys,
        )


def work_of(sizes: ModelSizes, phase: str, context: int, batch: int) -> tuple[Work, Work]:
    """The whole model's and its attention's.

    Gradients of matrices count twice their forward, of attention 2.5 times; what checkpointing
    computes again does not count.
    """
    if phase == "decode":
        attention = sizes.decode_attention(context, batch)
        return sizes.linear(batch, batch) + attention, attention
    attention = sizes.prefill_attention(context, batch)
    linear = sizes.linear(batch * context, batch)
    if phase == "train":
        attention = _times(attention, 1 + ATTENTION_BACKWARD)
        linear = _times(sizes.linear(batch * context, batch * context), 1 + LINEAR_BACKWARD)
    return linear + attention, attention


def causal_pairs(tokens: int, limit: int | None = None) -> int:
    """(query, key) pairs of causal attention where no query sees more than ``limit`` keys."""
    full = _seen(tokens, limit)
    return full * (full + 1) // 2 + (tokens - full) * full


def _times(work: Work, factor: float) -> Work:
    return Work(factor * work.flops, factor * work.moved)


def _reach(
    spec: HysparseSpec | None, windows: tuple[int | None, ...]
) -> Iterator[tuple[int | None, ...]]:
    """For each layer the keys that its branches reach at most; None for all."""
    sparse = () if spec is None else spec.layers.sparse_layers
    for layer, window in enumerate(windows):
        yield spec.kind.reach(spec) if spec is not None and layer in sparse else (window,)


def _seen(keys: int, limit: int | None) -> int:
    return keys if limit is None else min(keys, limit)
