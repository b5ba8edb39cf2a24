"""Readies whole sequences, forward and backward: full attention, block-sparse, window, a layer."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import operations, peers
from benchmarks.cases import Case, Inputs, Peer, Ready, Shape, peer_of, ready
from benchmarks.operations import Tensors
from benchmarks.options import Options
from hysparse_cli.bench import lists
from hysparse_cli.bench.work import causal_pairs

DIRECTIONS = ("forward", "backward")
TOPK_BYTES = 2**31  # of scores; beyond, torch.topk by itself is not worth its memory


def prefill_cases(op: str, options: Options, shape: Shape, device: torch.device) -> Iterator[Case]:
    """The cases of one op and shape, forward and backward."""
    made = "real" if options.lists else "synthetic"
    make = Inputs(options, shape, device)
    for direction in DIRECTIONS:
        if op == "full":
            yield Case(f"full + TopK {direction}", shape, "matmul", partial(full, make, direction))
        elif op == "window":
            name = f"window + sinks {direction}"
            yield Case(name, shape, "copy", partial(window, make, direction))
        elif op == "layer":
            name = f"sparse layer {direction}, {made} lists"
            yield Case(name, shape, "matmul", partial(sparse_layer, make, direction, made))
        elif op == "block-sparse":
            for kind in (made, "random"):
                name = f"block-sparse {direction}, {kind} lists"
                yield Case(name, shape, "matmul", partial(block_sparse, make, direction, kind))


def full(make: Inputs, direction: str) -> Ready:
    """Full attention that selects, beside dense attention, itself without TopK, and torch.topk."""
    inputs, grad_out = _inputs(make, direction)
    options, shape = make.options, make.shape
    seen, size = make.seen(), options.block_size
    beside = _dense(shape, inputs, grad_out)
    if grad_out is None:
        bare = operations.full(inputs, seen, block_size=size, top_k_blocks=0)
        beside += [
            peer_of(peers.UNSELECTED, (shape,), lambda x: bare.call(x, seen), inputs, None),
            Peer(peers.TORCH_TOPK, (peers.TORCH_TOPK, shape), partial(_torch_topk, make)),
        ]
    operation = operations.full(inputs, seen, block_size=size, top_k_blocks=options.top_k_blocks)
    pairs = causal_pairs(shape.keys) * shape.heads
    return ready(operation, grad_out, pairs, beside)


def block_sparse(make: Inputs, direction: str, kind: str) -> Ready:
    """Block-sparse attention over lists of one kind, beside both NSA kernels and cuDNN's dense."""
    inputs, grad_out = _inputs(make, direction)
    shape, size = make.shape, make.options.block_size
    inputs["block_idx"] = _lists(make, kind)
    pairs = lists.pairs_of(inputs["block_idx"], size) * shape.group
    by_head = inputs["block_idx"][0].transpose(0, 1).contiguous()
    ends = torch.tensor([0, shape.keys], dtype=torch.int32, device=make.device)
    for_xunhao = {name: inputs[name] for name in ("q", "k", "v")}
    for_xunhao |= {"by_head": by_head, "ends": ends}
    key = (shape, kind)

    def fla(x: Tensors) -> Tensor:
        return peers.fla_nsa(**x, block_size=size)

    def xunhao(x: Tensors) -> Tensor:
        return peers.xunhao_nsa(**x, block_size=size)

    beside = [
        peer_of(peers.FLA_NSA, key, fla, inputs, grad_out),
        peer_of(peers.XUNHAO_NSA, key, xunhao, for_xunhao, grad_out),
    ]
    beside += _dense(shape, inputs, grad_out)[:1]
    operation = operations.block_sparse(inputs, make.seen(), block_size=size)
    return ready(operation, grad_out, pairs, beside)


def window(make: Inputs, direction: str) -> Ready:
    """Sliding window attention with sinks, beside fla's."""
    inputs, grad_out = _inputs(make, direction)
    shape, tokens = make.shape, make.options.window_tokens
    inputs["sinks"] = make.sinks()

    def fla(x: Tensors) -> Tensor:
        return peers.fla_window(**x, window_tokens=tokens)

    beside = [peer_of(peers.FLA_WINDOW, (shape,), fla, inputs, grad_out)]
    operation = operations.window(inputs, make.seen(), window_tokens=tokens)
    return ready(operation, grad_out, _window_pairs(make), beside)


def sparse_layer(make: Inputs, direction: str, kind: str) -> Ready:
    """A sparse layer, beside the dense attention that it replaces."""
    inputs, grad_out = _inputs(make, direction)
    options = make.options
    inputs["block_idx"] = _lists(make, kind)
    inputs |= {"window_k": make.by_key(5), "window_v": make.by_key(6)}
    inputs |= {"gate_logits": make.by_query(7, width=2), "sinks": make.sinks(2)}
    operation = operations.sparse_layer(
        inputs, make.seen(), block_size=options.block_size, window_tokens=options.window_tokens
    )
    pairs = lists.pairs_of(inputs["block_idx"], options.block_size) * make.shape.group
    beside = _dense(make.shape, inputs, grad_out)[:1]
    return ready(operation, grad_out, pairs + _window_pairs(make), beside)


def _inputs(make: Inputs, direction: str) -> tuple[dict[str, Tensor], Tensor | None]:
    inputs = {"q": make.by_query(1), "k": make.by_key(2), "v": make.by_key(3)}
    return inputs, make.by_query(4) if direction == "backward" else None


def _dense(shape: Shape, inputs: Tensors, grad_out: Tensor | None) -> list[Peer]:
    inputs = {name: inputs[name] for name in ("q", "k", "v")}
    return [
        peer_of(peers.CUDNN, (shape,), lambda x: peers.cudnn(**x), inputs, grad_out),
        peer_of(peers.FLASH, (shape,), lambda x: peers.flash(**x), inputs, grad_out),
    ]


def _lists(make: Inputs, kind: str) -> Tensor:
    options, shape = make.options, make.shape
    sizes = (shape.keys, shape.kv_heads, options.top_k_blocks, options.block_size)
    if kind == "real":
        assert options.lists is not None
        return lists.read_lists(options.lists, *sizes).to(make.device)
    made = lists.random_lists if kind == "random" else lists.local_lists
    return made(*sizes, make.chance(8))


def _window_pairs(make: Inputs) -> int:
    return make.shape.heads * causal_pairs(make.shape.keys, make.options.window_tokens)


def _torch_topk(make: Inputs) -> list[Callable[[], object]]:
    options, shape = make.options, make.shape
    num_blocks = -(-shape.keys // options.block_size)
    sizes = (shape.keys, shape.kv_heads, num_blocks)
    needed = 4 * shape.keys * shape.kv_heads * num_blocks
    if needed > TOPK_BYTES:
        raise ValueError(f"not run on {needed / 2**30:.0f} GiB of scores")
    scores = torch.rand(*sizes, generator=make.chance(10), device=make.device)
    return [lambda: scores.topk(min(options.top_k_blocks, num_blocks), dim=-1)]
