"""The gated sum in Triton and its backward passes, held to the law."""

import pytest
import torch
from torch import Tensor

from hysparse_kernels.triton.window.gates import (
    delta,
    gated_sum,
    gated_sum_backward,
    gates_backward,
)
from tests.kernels.tolerance import assert_within_tolerance, truth_of

SHAPES = [(2, 7, 3, 16), (1, 33, 4, 80)]
LARGE = [(1, 1, 8, 64), (1, 63, 8, 96), (1, 257, 8, 256), (2, 1023, 8, 128)]


@pytest.fixture(
    params=[(shape, dtype) for shape in SHAPES for dtype in (torch.float16, torch.float32)]
    + [
        pytest.param((shape, dtype), marks=pytest.mark.gpu)
        for shape in LARGE
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ],
    ids=str,
)
def given(request: pytest.FixtureRequest, where: str) -> tuple[Tensor, ...]:
    """d_out, o_sparse, o_window, gate_logits."""
    if where == "cpu" and request.node.get_closest_marker("gpu"):
        pytest.skip("for a GPU")
    shape, dtype = request.param
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for _ in range(3)]
    tensors.append(2 * torch.randn(*shape[:-1], 2, generator=generator))
    return tuple(x.to(where, dtype) for x in tensors)


def plain(o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor) -> Tensor:
    gates = gate_logits.sigmoid()
    return gates[..., :1] * o_sparse + gates[..., 1:] * o_window


def test_gated_sum(given: tuple[Tensor, ...]) -> None:
    _, *inputs = given
    assert_within_tolerance(gated_sum(*inputs), plain(*inputs), truth_of("gated_sum", *inputs))


def test_gradients(given: tuple[Tensor, ...]) -> None:
    d_out, *inputs = given
    wide = [x.double().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(truth_of("gated_sum", *wide), wide, d_out.double())
    same = [x.detach().requires_grad_() for x in inputs]
    theirs = torch.autograd.grad(plain(*same), same, d_out)
    names = ("d_o_sparse", "d_o_window", "d_gate_logits")
    ours = gated_sum_backward(d_out, *inputs)
    for name, a, b, c in zip(names, ours, theirs, wanted, strict=True):
        assert_within_tolerance(a, b, c, gradient=True, name=name)


def test_what_the_branches_need(given: tuple[Tensor, ...]) -> None:
    d_out, *inputs = given
    d_gate_logits, gates, *deltas = gates_backward(d_out, *inputs)
    assert torch.equal(d_gate_logits, gated_sum_backward(d_out, *inputs)[2])
    for i in range(2):
        gate, d_gated = inputs[2][..., i].double().sigmoid(), d_out.double() * inputs[i].double()
        assert_within_tolerance(gates[i], gate.float(), gate)
        in_float32 = gate.float() * (d_out.float() * inputs[i].float()).sum(-1)
        assert_within_tolerance(deltas[i], in_float32, gate * d_gated.sum(-1), gradient=True)


def test_delta(given: tuple[Tensor, ...]) -> None:
    d_out, out, *_ = given
    in_float32 = (d_out.float() * out.float()).sum(-1)
    wanted = (d_out.double() * out.double()).sum(-1)
    assert_within_tolerance(delta(d_out, out), in_float32, wanted, gradient=True)


def test_strides_and_emptiness(where: str) -> None:
    o = torch.randn(2, 3, 5, 16, device=where)
    strided = o.transpose(1, 2).contiguous().transpose(1, 2)
    logits = o[..., :2]
    assert torch.equal(gated_sum(o, strided, logits), gated_sum(strided, o, logits.contiguous()))
    assert gated_sum(o[:0], o[:0], logits[:0]).shape == (0, 3, 5, 16)
    assert delta(o[:, :0], o[:, :0]).shape == (2, 0, 5)
