"""Readies one new token of each sequence, in a CUDA graph: full attention, and a sparse layer."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import operations, peers
from benchmarks.cases import Case, Inputs, Peer, Ready, Shape, forward_of, forward_run
from benchmarks.check import check_forward
from benchmarks.options import Options
from hysparse_cli.bench.work import Work
from hysparse_kernels import causal

# Data that a graph's calls read between two looks at the same, far more than any L2 cache holds.
APART_BYTES = 2**28


def decode_cases(options: Options, shape: Shape, device: torch.device) -> Iterator[Case]:
    """Both cases of one shape."""
    make = Inputs(options, shape, device)
    for name, start in (("full + TopK", full), ("sparse layer", sparse_layer)):
        yield Case(f"decode, {name}", shape, "copy", partial(start, make), in_graph=True)


def full(make: Inputs) -> Ready:
    """Full attention that selects, beside dense attention."""
    options, shape, seen = make.options, make.shape, make.seen()
    q, caches = make.by_query(1), _caches(make)
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
    return Ready(
        made[0],
        [forward_of(operation) for operation in made],
        lambda: check_forward(made[0]),
        Work(flops, 2 * (q.nbytes + k.nbytes)),
        _dense(shape, q, caches),
    )


def sparse_layer(make: Inputs) -> Ready:
    """A sparse layer over random lists, beside the dense attention that it replaces."""
    options, shape = make.options, make.shape
    q, window = make.by_query(1), min(options.window_tokens, shape.keys)
    caches = _caches(make)
    k, v = caches[0]
    blocks = min(options.top_k_blocks, shape.keys // options.block_size)
    read = 2 * shape.batch * (blocks * options.block_size + window) * k[0, 0].nbytes
    gates, sinks = make.by_query(7, width=2), make.sinks(2)
    own = {"window_k": make.by_key(5, window), "window_v": make.by_key(6, window)}
    made = [
        operations.sparse_layer(
            {"q": q, "k": k, "v": v, "block_idx": _lists(make, 20 + i), "gate_logits": gates}
            | {name: x.clone() for name, x in own.items()}
            | {"sinks": sinks},
            make.seen(),
            block_size=options.block_size,
            window_tokens=options.window_tokens,
            window_range=causal(1, window, make.device),
        )
        for i in range(1 + APART_BYTES // read if make.device.type == "cuda" else 1)
    ]
    pairs = shape.batch * shape.heads * (blocks * options.block_size + window)
    moved = read + 2 * q.nbytes + gates.nbytes + made[0].inputs["block_idx"].nbytes
    return Ready(
        made[0],
        [forward_of(operation) for operation in made],
        lambda: check_forward(made[0]),
        Work(4.0 * shape.head_dim * pairs, moved),
        _dense(shape, q, caches),
    )


def _caches(make: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, enough pairs that none is in the L2 cache when it is read again."""
    k, v = make.by_key(2), make.by_key(3)
    copies = APART_BYTES // (2 * k.nbytes) if make.device.type == "cuda" else 0
    return [(k, v), *((k.clone(), v.clone()) for _ in range(copies))]


def _lists(make: Inputs, seed: int) -> Tensor:
    """(B, 1, G, K) drawn at random."""
    options, shape = make.options, make.shape
    num_blocks = -(-shape.keys // options.block_size)
    sizes = (shape.batch, 1, shape.kv_heads, num_blocks)
    scores = torch.rand(*sizes, generator=make.chance(seed), device=make.device)
    chosen = scores.topk(min(options.top_k_blocks, num_blocks), dim=-1).indices
    return chosen.sort(dim=-1).values.int()


def _dense(shape: Shape, q: Tensor, caches: list[tuple[Tensor, Tensor]]) -> list[Peer]:
    def peer(name: str, function: Callable[..., Tensor]) -> Peer:
        def start() -> list[Callable[[], Tensor]]:
            inputs = [{"q": q, "k": k, "v": v} for k, v in caches]
            return [forward_run(lambda x: function(**x), x) for x in inputs]

        return Peer(name, (name, shape), start)

    return [peer(peers.CUDNN, peers.cudnn), peer(peers.FLASH, peers.flash)]
