"""Every tensor argument of every public op may lie in memory as it likes, forward and backward."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import Tensor

from tests.kernels.calls import (
    HOPPER,
    OPS,
    PREFILL,
    Sizes,
    arguments,
    d_out_of,
    run,
    tensor_arguments,
    truth_of,
)
from tests.kernels.tolerance import assert_within_tolerance

pytestmark = pytest.mark.usefixtures("backend")


def junk(x: Tensor) -> Tensor:
    """What a kernel must not read for ``x``."""
    if x.is_floating_point():
        return torch.full_like(x, torch.nan)
    return ~x if x.dtype == torch.bool else x + 1


def transposed(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def stepped(x: Tensor) -> Tensor:
    return torch.stack([x, junk(x)], -1).flatten(-2)[..., ::2]


def columns_of_wider(x: Tensor) -> Tensor:
    return torch.cat([junk(x), x, junk(x)], -1)[..., x.shape[-1] : -x.shape[-1]]


def offset_by_one(x: Tensor) -> Tensor:
    flat = x.flatten()
    return torch.cat([junk(flat[:1]), flat])[1:].view(x.shape)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


LAYOUTS = (transposed, stepped, columns_of_wider, offset_by_one, expanded)
Layout = Callable[[Tensor], Tensor]


def check(op: str, sizes: Sizes, layouts: dict[str, Layout], where: str) -> None:
    """The call with some arguments laid out otherwise errs no more than with all contiguous."""
    tensors = arguments(op, sizes, where)
    d_out = None if sizes.T < SMALL.T else d_out_of(op, sizes, where)
    there = {n: layouts[n](x) if n in layouts else x for n, x in tensors.items()}
    same = {n: x.contiguous().clone() for n, x in there.items()}
    selects = sizes.T < SMALL.T or where == "cuda"
    options = {} if selects or op != "full_attention" else UNSELECTING
    ours = run(op, there, None if d_out is None else transposed(d_out), **options)
    plain, truth = run(op, same, d_out, **options), truth_of(op, same, d_out, **options)
    assert ours.keys() == truth.keys()
    for name, x in ours.items():
        if name == "block_idx":
            assert torch.equal(x, plain[name])
            continue
        seen = truth[name].isfinite()
        assert torch.equal(x.isfinite(), seen), name
        assert_within_tolerance(
            *(y.masked_fill(~seen, 0) for y in (x, plain[name], truth[name])),
            gradient=name.startswith("d "),
            name=name,
        )


SMALL = Sizes(T=33, S=36, H=2, G=1, dtype=torch.float16)
DECODE = replace(SMALL, T=1, H=4, G=2)
UNSELECTING = {"block_size": None, "top_k_blocks": 0, "return_block_scores": False}


@pytest.mark.parametrize("sizes", [SMALL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("op", [op for op in OPS if op != "block_sparse_attention"])
def test_each_argument_has_another_layout(op: str, sizes: Sizes, where: str) -> None:
    layouts = (transposed, stepped, columns_of_wider, offset_by_one)
    check(op, sizes, dict(zip(tensor_arguments(op), cycle(layouts), strict=False)), where)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [SMALL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("op", OPS)
def test_all_arguments_are_one_row_for_the_batch(op: str, sizes: Sizes, where: str) -> None:
    check(op, sizes, dict.fromkeys(tensor_arguments(op), expanded), where)


@pytest.mark.parametrize(
    "where",
    [pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.gpu)],
    indirect=True,
)
@pytest.mark.parametrize("sizes", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS for name in tensor_arguments(op)]
)
def test_each_argument_alone_in_each_layout(op: str, name: str, sizes: Sizes, where: str) -> None:
    for layout in LAYOUTS:
        check(op, sizes, {name: layout}, where)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cuda"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_what_the_kernels_for_hopper_take(op: str, layout: Layout, where: str) -> None:
    """Sinks and lists alone, since these kernels leave strided q, k and v to the others."""
    names = [n for n in tensor_arguments(op) if n in ("sinks", "block_idx", "gate_logits")]
    check(op, HOPPER, dict.fromkeys(names, layout), where)
