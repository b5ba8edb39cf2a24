"""Calls of every public op, made from its signature: a new tensor argument needs a row here.

An argument is named as in the signature, a key range's tensors as ``key_range.first``.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

import torch
from torch import Tensor

import hysparse_kernels as ops
from hysparse_kernels import KeyRange, backends

OPS = (
    "full_attention",
    "block_sparse_attention",
    "sliding_window_attention",
    "gated_sum",
    "sparse_layer_attention",
)
SHAPES = {
    "q": "BTHD",
    "k": "BSGD",
    "v": "BSGD",
    "shared_k": "BSGD",
    "shared_v": "BSGD",
    "window_k": "BSGD",
    "window_v": "BSGD",
    "o_sparse": "BTHD",
    "o_window": "BTHD",
    "gate_logits": "BTH2",
    "block_idx": "BTGK",
    "sinks": "H",
    "first": "BT",
    "last": "BT",
    "mask": "BS",
}
BLOCK, WINDOW, SELECTED = 16, 20, 2
OPTIONS: dict[str, dict[str, Any]] = {
    "full_attention": {"block_size": BLOCK, "top_k_blocks": 2, "return_block_scores": True},
    "block_sparse_attention": {"block_size": BLOCK},
    "sliding_window_attention": {"window_tokens": WINDOW},
    "gated_sum": {},
    "sparse_layer_attention": {"block_size": BLOCK, "window_tokens": WINDOW},
}


@dataclass(frozen=True)
class Sizes:
    """ranges: whether calls have key ranges; else they are plain causal."""

    B: int = 2
    T: int = 35
    S: int = 40
    H: int = 4
    G: int = 2
    D: int = 16
    K: int = SELECTED
    dtype: torch.dtype = torch.float32
    ranges: bool = True

    def of(self, legend: str) -> tuple[int, ...]:
        return tuple(int(x) if x.isdigit() else getattr(self, x) for x in legend)


@cache
def tensor_arguments(op: str) -> tuple[str, ...]:
    """The names of all tensors that an op takes."""
    names: list[str] = []
    hints = get_type_hints(getattr(ops, op))
    for name in inspect.signature(getattr(ops, op)).parameters:
        if hints[name] in (Tensor, Tensor | None):
            names.append(name)
        elif hints[name] == KeyRange | None:
            fields = get_type_hints(KeyRange)
            names += [f"{name}.{x}" for x in fields if fields[x] in (Tensor, Tensor | None)]
    return tuple(names)


def arguments(op: str, sizes: Sizes, where: str) -> dict[str, Tensor]:
    """Random tensors for an op: every row left-padded otherwise, a mask with holes."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in tensor_arguments(op):
        field = name.split(".")[-1]
        if field != name and not sizes.ranges:
            continue
        legend = "H2" if (op, name) == ("sparse_layer_attention", "sinks") else SHAPES[field]
        made[name] = _draw(field, sizes.of(legend), sizes, generator).to(where)
    return made


def _draw(field: str, shape: tuple[int, ...], sizes: Sizes, generator: torch.Generator) -> Tensor:
    if field == "mask":
        return torch.rand(shape, generator=generator) < 0.8
    if field == "last":
        return torch.arange(sizes.S - sizes.T, sizes.S).expand(shape).contiguous()
    if field == "first":
        return (7 * torch.arange(sizes.B))[:, None].expand(shape).contiguous()
    if field == "block_idx":
        order = torch.rand(*shape[:-1], -(-sizes.S // BLOCK), generator=generator)
        return order.argsort(-1)[..., : sizes.K].int()
    x = torch.randn(shape, generator=generator)
    return x if field in ("sinks", "gate_logits") else x.to(sizes.dtype)


def run(
    op: str, tensors: dict[str, Tensor], d_out: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """The results of a call by name, and with ``d_out`` the gradients of all floating arguments.

    Without it no gradients are recorded, so that decode kernels run where they can.
    """
    leaves = {
        name: x.detach().requires_grad_(x.is_floating_point() and d_out is not None)
        for name, x in tensors.items()
    }
    ranges: dict[str, dict[str, Tensor]] = {}
    for name, x in leaves.items():
        if "." in name:
            ranges.setdefault(name.split(".")[0], {})[name.split(".")[1]] = x
    given = {name: x for name, x in leaves.items() if "." not in name}
    given |= {name: KeyRange(**{"first": None, **fields}) for name, fields in ranges.items()}
    with torch.set_grad_enabled(d_out is not None):
        result = getattr(ops, op)(**given, **{**OPTIONS[op], **options})
    named = {"out": result} if isinstance(result, Tensor) else result._asdict()
    found = {name: x.detach() for name, x in named.items() if x is not None}
    if d_out is not None:
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        gradients = torch.autograd.grad(named["out"], list(wanted.values()), d_out)
        found |= {f"d {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return found


def truth_of(
    op: str, tensors: dict[str, Tensor], d_out: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """``run`` by the reference in float64."""
    wide = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    with backends.run_by("reference"):
        return run(op, wide, None if d_out is None else d_out.double(), **options)


def d_out_of(op: str, sizes: Sizes, where: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sizes.of("BTHD"), generator=generator).to(where, sizes.dtype)


PREFILL = Sizes()
HOPPER = Sizes(T=300, S=300, H=8, D=128, dtype=torch.bfloat16, ranges=False)
