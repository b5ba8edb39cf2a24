"""The public ops on the Triton backend: held to the law, differentiable, known to torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hysparse_kernels as ops
from hysparse_kernels import KeyRange, backends, causal, reference
from tests.kernels.tolerance import (
    assert_within_tolerance,
    plain_attention,
    visible_blocks,
    visible_keys,
    visible_window,
)

BLOCK, TOP, WINDOW = 16, 2, 20
H, G, D = 4, 2, 16
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "triton")


class Layer:
    """A sparse attention layer's inputs, and those of the full layer that serves it."""

    def __init__(self, where: str, tokens: int, dtype: torch.dtype = torch.float32, batch: int = 2):
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(where, dtype)

        generator = torch.Generator().manual_seed(tokens)
        self.q = 2 * draw(batch, tokens, H, D)
        self.k, self.v, self.own_k, self.own_v = (draw(batch, tokens, G, D) for _ in range(4))
        self.gate_logits, self.sinks = draw(batch, tokens, H, 2), draw(H, 2)
        first = torch.zeros(batch, tokens, dtype=torch.long, device=where)
        first[0, tokens // 3 :] = tokens // 3
        self.packed = KeyRange(first, causal(tokens, tokens, first.device).last)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.own_k, self.own_v, self.gate_logits, self.sinks


def run(layer: tuple[Tensor, ...], seen: KeyRange, block_idx: Tensor, module: Any) -> Tensor:
    q, k, v, own_k, own_v, gate_logits, sinks = layer
    result: Tensor = module.sparse_layer_attention(
        q,
        k,
        v,
        block_idx,
        own_k,
        own_v,
        gate_logits,
        key_range=seen,
        window_range=seen,
        block_size=BLOCK,
        window_tokens=WINDOW,
        scale=D**-0.5,
        sinks=sinks,
        softcap=None,
    )
    return result


def plain_layer(layer: tuple[Tensor, ...], seen: KeyRange, block_idx: Tensor) -> Tensor:
    q, k, v, own_k, own_v, gate_logits, sinks = layer
    blocks = visible_blocks(seen, k.shape[1], block_idx, BLOCK)
    window = visible_window(seen, k.shape[1], WINDOW)
    o_sparse = plain_attention(q, k, v, blocks, scale=D**-0.5, sinks=sinks[:, 0])
    o_window = plain_attention(q, own_k, own_v, window, scale=D**-0.5, sinks=sinks[:, 1])
    gates = gate_logits.sigmoid()
    return gates[..., :1] * o_sparse + gates[..., 1:] * o_window


def gradients(
    forward: Callable[[tuple[Tensor, ...]], Tensor], inputs: tuple[Tensor, ...], d_out: Tensor
) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    out = forward(leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))


NAMES = ("out", "dq", "d_k", "d_v", "d_own_k", "d_own_v", "d_gate_logits", "d_sinks")


@pytest.mark.parametrize(("tokens", "packed"), [(1, False), (37, False), (37, True)])
def test_a_sparse_layer_and_its_gradients(where: str, tokens: int, packed: bool) -> None:
    layer = Layer(where, tokens)
    inputs = layer.tensors()
    seen = layer.packed if packed else causal(tokens, tokens, layer.q.device)
    served = ops.full_attention(
        layer.q, layer.k, layer.v, key_range=seen, block_size=BLOCK, top_k_blocks=TOP
    )
    block_idx = served.block_idx
    assert block_idx is not None
    d_out = torch.randn_like(layer.q)
    ours = gradients(lambda x: run(x, seen, block_idx, ops), inputs, d_out)
    plain = gradients(lambda x: plain_layer(x, seen, block_idx), inputs, d_out)
    wide = tuple(x.double() for x in inputs)
    truth = gradients(lambda x: run(x, seen, block_idx, reference), wide, d_out)
    for name, a, b, c in zip(NAMES, ours, plain, truth, strict=True):
        assert_within_tolerance(a, b, c, gradient=name != "out", name=name)
    with torch.no_grad():
        inference = run(inputs, seen, block_idx, ops)
    assert_within_tolerance(inference, plain[0], truth[0])


def test_full_attention_its_selection_and_its_gradients(where: str) -> None:
    layer = Layer(where, 37)
    seen, options = layer.packed, {"block_size": BLOCK, "top_k_blocks": TOP}
    inputs = layer.q, layer.k, layer.v
    result = ops.full_attention(*inputs, key_range=seen, return_block_scores=True, **options)
    wide = tuple(x.double() for x in inputs)
    theirs, exact = (
        reference.full_attention(
            *x, seen, scale=D**-0.5, sinks=None, softcap=None, return_block_scores=True, **options
        )
        for x in (inputs, wide)
    )
    assert result.block_idx is not None and exact.block_idx is not None
    assert result.block_idx.equal(exact.block_idx)
    assert not result.lse.requires_grad and not result.block_scores.requires_grad
    assert_within_tolerance(result.block_scores, theirs.block_scores, exact.block_scores)

    def plain(x: tuple[Tensor, ...]) -> Tensor:
        return plain_attention(*x, visible_keys(seen, 37), scale=D**-0.5)

    def ours_of(x: tuple[Tensor, ...]) -> Tensor:
        return ops.full_attention(*x, key_range=seen).out

    d_out = torch.randn_like(layer.q)
    columns = (
        gradients(ours_of, inputs, d_out),
        gradients(plain, inputs, d_out),
        gradients(plain, wide, d_out),
    )
    for name, a, b, c in zip(NAMES, *columns, strict=False):
        assert_within_tolerance(a, b, c, gradient=name != "out", name=name)


@pytest.mark.parametrize(
    "strided", [pytest.param(False, marks=pytest.mark.long), True], ids=["", "strided"]
)
def test_torch_library_finds_nothing_wrong(where: str, strided: bool) -> None:
    layer = Layer(where, 5, batch=1)
    q, k, v, own_k, own_v = (
        (x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x).requires_grad_()
        for x in (layer.q, layer.k, layer.v, layer.own_k, layer.own_v)
    )
    scale, seen = D**-0.5, (None, causal(5, 5, q.device).last, None, 0)
    op = torch.ops.hysparse
    full = (scale, None, None, BLOCK, TOP, True)
    block_idx = op.full_attention(q, k, v, *seen, *full)[2]
    sinks = layer.sinks.requires_grad_()
    own = (own_k, own_v, layer.gate_logits)
    calls: tuple[tuple[Any, tuple[Any, ...]], ...] = (
        (op.full_attention, (q, k, v, *seen, *full)),
        (
            op.block_sparse_attention,
            (q, k, v, block_idx, *seen, BLOCK, scale, sinks[:, 0].contiguous(), None),
        ),
        (op.sliding_window_attention, (q, own_k, own_v, *seen, WINDOW, scale, None, None)),
        (op.gated_sum, (q, q.clone(), layer.gate_logits)),
        (
            op.sparse_layer_attention,
            (*(q, k, v, block_idx, *own), *seen, *seen, *(BLOCK, WINDOW, scale, sinks, None, True)),
        ),
    )
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=CHECKS)


def test_a_length_that_changes_compiles_nothing_again(where: str) -> None:
    torch._dynamo.reset()
    compilations = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    @torch.compile(backend=count, fullgraph=True, dynamic=True)
    def layer_of(q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor) -> Tensor:
        full = ops.full_attention(q, k, v, block_size=BLOCK, top_k_blocks=TOP)
        assert full.block_idx is not None
        sparse = ops.sparse_layer_attention(
            q, k, v, full.block_idx, k, v, gate_logits, block_size=BLOCK, window_tokens=WINDOW
        )
        return full.out + sparse

    for tokens in (35, 38, 44):
        layer = Layer(where, tokens, batch=1)
        inputs = layer.q, layer.k, layer.v, layer.gate_logits
        compiled = layer_of(*inputs)
        assert compiled.equal(layer_of.__wrapped__(*inputs))
    assert compilations == 1
