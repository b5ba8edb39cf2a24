"""Whole sequences, forward and backward: full attention, block-sparse, window, and a layer."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hysparse_cli.bench.kernels import lists, operations, peers
from hysparse_cli.bench.kernels.check import Tensors
from hysparse_cli.bench.kernels.targets import (
    CUDNN,
    FLA_NSA,
    FLA_WINDOW,
    FLASH,
    TORCH_TOPK,
    UNSELECTED,
    XUNHAO_NSA,
)
from hysparse_cli.bench.kernels.work import Case, Inputs, Peer, Shape, Work, peer_of, work_of
from hysparse_cli.recipe import KernelBenchOptions

DIRECTIONS = ("forward", "backward")
TOPK_BYTES = 2**31  # of scores; beyond, torch.topk alone is not worth its memory


def prefill_cases(
    op: str, options: KernelBenchOptions, shape: Shape, device: torch.device
) -> Iterator[Case]:
    """The cases of one op and shape, forward and backward."""
    made = "real" if options.lists else "synthetic"
    maker = Inputs(options, shape, device)
    for direction in DIRECTIONS:
        if op == "full":
            yield Case(f"full + TopK {direction}", shape, "matmul", partial(full, maker, direction))
        elif op == "window":
            name = f"window + sinks {direction}"
            yield Case(name, shape, "copy", partial(window, maker, direction))
        elif op == "layer":
            name = f"sparse layer {direction}, {made} lists"
            yield Case(name, shape, "matmul", partial(sparse_layer, maker, direction, made))
        elif op == "block-sparse":
            for kind in (made, "random"):
                name = f"block-sparse {direction}, {kind} lists"
                yield Case(name, shape, "matmul", partial(block_sparse, maker, direction, kind))


def full(maker: Inputs, direction: str) -> Work:
    """Full attention that selects, beside dense attention, itself without TopK, and torch.topk."""
    inputs, grad_out = _inputs(maker, direction)
    options, shape = maker.options, maker.shape
    seen, size = maker.seen(), options.block_size
    beside = _dense(shape, inputs, grad_out)
    if grad_out is None:
        bare = operations.full(inputs, seen, block_size=size, top_k_blocks=0)
        beside += [
            peer_of(UNSELECTED, (shape,), lambda x: bare.call(x, seen), inputs, None),
            Peer(TORCH_TOPK, (TORCH_TOPK, shape), partial(_torch_topk, maker)),
        ]
    operation = operations.full(inputs, seen, block_size=size, top_k_blocks=options.top_k_blocks)
    pairs = shape.keys * (shape.keys + 1) // 2
    return work_of(operation, grad_out, pairs * shape.heads, beside)


def block_sparse(maker: Inputs, direction: str, kind: str) -> Work:
    """Block-sparse attention over lists of one kind, beside both NSA kernels and cuDNN's dense."""
    inputs, grad_out = _inputs(maker, direction)
    shape, size = maker.shape, maker.options.block_size
    inputs["block_idx"] = _lists(maker, kind)
    pairs = lists.pairs_of(inputs["block_idx"], size) * shape.group
    by_head = inputs["block_idx"][0].transpose(0, 1).contiguous()
    ends = torch.tensor([0, shape.keys], dtype=torch.int32, device=maker.device)
    for_xunhao = {name: inputs[name] for name in ("q", "k", "v")}
    for_xunhao |= {"by_head": by_head, "ends": ends}
    key = (shape, kind)
    beside = [
        peer_of(FLA_NSA, key, lambda x: peers.fla_nsa(**x, block_size=size), inputs, grad_out),
        peer_of(
            XUNHAO_NSA,
            key,
            lambda x: peers.xunhao_nsa(**x, block_size=size),
            for_xunhao,
            grad_out,
        ),
    ]
    beside += _dense(shape, inputs, grad_out)[:1]
    operation = operations.block_sparse(inputs, maker.seen(), block_size=size)
    return work_of(operation, grad_out, pairs, beside)


def window(maker: Inputs, direction: str) -> Work:
    """Sliding window attention with sinks, beside fla's."""
    inputs, grad_out = _inputs(maker, direction)
    shape, tokens = maker.shape, maker.options.window_tokens
    inputs["sinks"] = maker.sinks()
    beside = [
        peer_of(
            FLA_WINDOW,
            (shape,),
            lambda x: peers.fla_window(**x, window_tokens=tokens),
            inputs,
            grad_out,
        )
    ]
    operation = operations.window(inputs, maker.seen(), window_tokens=tokens)
    return work_of(operation, grad_out, _window_pairs(maker), beside)


def sparse_layer(maker: Inputs, direction: str, kind: str) -> Work:
    """A sparse layer, beside the dense attention that it replaces."""
    inputs, grad_out = _inputs(maker, direction)
    options = maker.options
    inputs["block_idx"] = _lists(maker, kind)
    inputs |= {"window_k": maker.by_key(5), "window_v": maker.by_key(6)}
    inputs |= {"gate_logits": maker.by_query(7, width=2), "sinks": maker.sinks(2)}
    operation = operations.sparse_layer(
        inputs, maker.seen(), block_size=options.block_size, window_tokens=options.window_tokens
    )
    pairs = lists.pairs_of(inputs["block_idx"], options.block_size) * maker.shape.group
    beside = _dense(maker.shape, inputs, grad_out)[:1]
    return work_of(operation, grad_out, pairs + _window_pairs(maker), beside)


def _inputs(maker: Inputs, direction: str) -> tuple[dict[str, Tensor], Tensor | None]:
    inputs = {"q": maker.by_query(1), "k": maker.by_key(2), "v": maker.by_key(3)}
    return inputs, maker.by_query(4) if direction == "backward" else None


def _dense(shape: Shape, inputs: Tensors, grad_out: Tensor | None) -> list[Peer]:
    inputs = {name: inputs[name] for name in ("q", "k", "v")}
    return [
        peer_of(CUDNN, (shape,), lambda x: peers.cudnn(**x), inputs, grad_out),
        peer_of(FLASH, (shape,), lambda x: peers.flash(**x), inputs, grad_out),
    ]


def _lists(maker: Inputs, kind: str) -> Tensor:
    options, shape = maker.options, maker.shape
    sizes = (shape.keys, shape.kv_heads, options.top_k_blocks, options.block_size)
    if kind == "real":
        return lists.read_lists(Path(str(options.lists)), *sizes).to(maker.device)
    make = lists.random_lists if kind == "random" else lists.local_lists
    return make(*sizes, maker.chance(8))


def _window_pairs(maker: Inputs) -> int:
    keys, tokens = maker.shape.keys, min(maker.options.window_tokens, maker.shape.keys)
    return maker.shape.heads * (tokens * keys - tokens * (tokens - 1) // 2)


def _torch_topk(maker: Inputs) -> list[Callable[[], object]]:
    options, shape = maker.options, maker.shape
    num_blocks = -(-shape.keys // options.block_size)
    sizes = (shape.keys, shape.kv_heads, num_blocks)
    needed = 4 * shape.keys * shape.kv_heads * num_blocks
    if needed > TOPK_BYTES:
        raise ValueError(f"not run on {needed / 2**30:.0f} GiB of scores")
    scores = torch.rand(*sizes, generator=maker.chance(10), device=maker.device)
    return [lambda: scores.topk(min(options.top_k_blocks, num_blocks), dim=-1)]
