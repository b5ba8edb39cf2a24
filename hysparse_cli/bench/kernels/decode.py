"""One new token of each sequence, in a CUDA graph: full attention, and a sparse layer."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hysparse_cli.bench.kernels import operations, peers
from hysparse_cli.bench.kernels.check import check_forward
from hysparse_cli.bench.kernels.targets import CUDNN, FLASH
from hysparse_cli.bench.kernels.work import Case, Inputs, Peer, Shape, Work, forward_of, forward_run
from hysparse_cli.recipe import KernelBenchOptions
from hysparse_kernels import causal

# Data that a graph's calls read between two looks at the same, far more than any L2 cache holds.
APART_BYTES = 2**28


def decode_cases(options: KernelBenchOptions, shape: Shape, device: torch.device) -> Iterator[Case]:
    """Both cases of one shape."""
    maker = Inputs(options, shape, device)
    for name, start in (("full + TopK", full), ("sparse layer", sparse_layer)):
        yield Case(f"decode, {name}", shape, "copy", partial(start, maker), in_graph=True)


def full(maker: Inputs) -> Work:
    """Full attention that selects, beside dense attention."""
    options, shape, seen = maker.options, maker.shape, maker.seen()
    q, caches = maker.by_query(1), _caches(maker)
    made = [
        operations.full(
            {"q": q, "k": k, "v": v},
            seen,
            block_size=options.block_size,
            top_k_blocks=options.top_k_blocks,
        )
        for k, v in caches
    ]
    k = caches[0][0]
    flops = 4.0 * shape.batch * shape.heads * shape.keys * shape.head_dim
    return Work(
        made[0],
        [forward_of(operation) for operation in made],
        lambda: check_forward(made[0]),
        flops,
        2 * (q.nbytes + k.nbytes),
        _dense(shape, q, caches),
    )


def sparse_layer(maker: Inputs) -> Work:
    """A sparse layer over random lists, beside the dense attention that it replaces."""
    options, shape = maker.options, maker.shape
    q, window = maker.by_query(1), min(options.window_tokens, shape.keys)
    caches = _caches(maker)
    k, v = caches[0]
    blocks = min(options.top_k_blocks, shape.keys // options.block_size)
    read = 2 * shape.batch * (blocks * options.block_size + window) * k[0, 0].nbytes
    gates, sinks = maker.by_query(7, width=2), maker.sinks(2)
    own = {"window_k": maker.by_key(5, window), "window_v": maker.by_key(6, window)}
    made = [
        operations.sparse_layer(
            {"q": q, "k": k, "v": v, "block_idx": _lists(maker, 20 + i), "gate_logits": gates}
            | {name: x.clone() for name, x in own.items()}
            | {"sinks": sinks},
            maker.seen(),
            block_size=options.block_size,
            window_tokens=options.window_tokens,
            window_range=causal(1, window, maker.device),
        )
        for i in range(1 + APART_BYTES // read if maker.device.type == "cuda" else 1)
    ]
    flops = 4.0 * shape.batch * shape.heads * (blocks * options.block_size + window)
    return Work(
        made[0],
        [forward_of(operation) for operation in made],
        lambda: check_forward(made[0]),
        flops * shape.head_dim,
        read + 2 * q.nbytes + gates.nbytes + made[0].inputs["block_idx"].nbytes,
        _dense(shape, q, caches),
    )


def _caches(maker: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, enough pairs that none is in the L2 cache when it is read again."""
    k, v = maker.by_key(2), maker.by_key(3)
    copies = APART_BYTES // (2 * k.nbytes) if maker.device.type == "cuda" else 0
    return [(k, v), *((k.clone(), v.clone()) for _ in range(copies))]


def _lists(maker: Inputs, seed: int) -> Tensor:
    """(B, 1, G, K) drawn at random."""
    options, shape = maker.options, maker.shape
    num_blocks = -(-shape.keys // options.block_size)
    sizes = (shape.batch, 1, shape.kv_heads, num_blocks)
    scores = torch.rand(*sizes, generator=maker.chance(seed), device=maker.device)
    chosen = scores.topk(min(options.top_k_blocks, num_blocks), dim=-1).indices
    return chosen.sort(dim=-1).values.int()


def _dense(shape: Shape, q: Tensor, caches: list[tuple[Tensor, Tensor]]) -> list[Peer]:
    def peer(name: str, function: Callable[..., Tensor]) -> Peer:
        def start() -> list[Callable[[], Tensor]]:
            inputs = [{"q": q, "k": k, "v": v} for k, v in caches]
            return [forward_run(lambda x: function(**x), x) for x in inputs]

        return Peer(name, (name, shape), start)

    return [peer(CUDNN, peers.cudnn), peer(FLASH, peers.flash)]
