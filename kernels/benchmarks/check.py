"""Checks a kernel on a slice of the very inputs it is timed on.

By the law of ``hysparse_kernels.tolerance``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.operations import PER_QUERY, Operation, Tensors, plain_logits, visible_keys
from hysparse_cli.bench.selection import scores_of, shortfall
from hysparse_kernels import KeyRange
from hysparse_kernels.backends import run_by
from hysparse_kernels.tolerance import FACTOR, Error, judge

CHECKED_QUERIES = 64
CHECKED_SEQUENCES = 2


def check_forward(operation: Operation) -> list[Error]:
    """The output at queries spread over the text, and what was selected there."""
    queries, device = operation.inputs["q"].shape[1], operation.inputs["q"].device
    rows = torch.linspace(0, queries - 1, min(CHECKED_QUERIES, queries), device=device).long()
    with torch.no_grad():
        result = operation.call(operation.inputs, operation.seen)
        ours = output_of(result)[:CHECKED_SEQUENCES, rows]
        chosen = getattr(result, "block_idx", None)
        inputs, seen = _at(operation, rows)
        plain = operation.plain(inputs, seen)
        with run_by("reference"):
            truth = operation.call(_wide(inputs), seen)
        errors = judge("out", ours, plain, output_of(truth))
        if chosen is not None:
            chosen = chosen[:CHECKED_SEQUENCES, rows]
            errors.append(_selection_error(operation, inputs, seen, chosen))
    return errors


def check_backward(operation: Operation, grad_out: Tensor) -> list[Error]:
    """The gradients at the last queries and keys: no others reach those keys."""
    last = min(CHECKED_QUERIES, operation.inputs["q"].shape[1])
    rows = torch.arange(operation.inputs["q"].shape[1], device=grad_out.device)[-last:]
    inputs, seen = _at(operation, rows)
    grad_rows = grad_out[:CHECKED_SEQUENCES, rows]
    ours = gradients(lambda x: operation.call(x, operation.seen), operation.inputs, grad_out)
    plain = gradients(lambda x: operation.plain(x, seen), inputs, grad_rows)
    with run_by("reference"):
        truth = gradients(lambda x: operation.call(x, seen), _wide(inputs), grad_rows.double())

    errors: list[Error] = []
    for name in truth:
        if operation.inputs[name].dim() == 4:  # a sink's gradient is of all queries
            slices = (x[name][:CHECKED_SEQUENCES, -last:] for x in (ours, plain, truth))
            errors += judge(f"d{name}", *slices, gradient=True)
    return errors


def output_of(result: Any) -> Tensor:
    """The output tensor of what an op returns."""
    out: Tensor = result if isinstance(result, Tensor) else result.out
    return out


def leaves_of(inputs: Tensors) -> dict[str, Tensor]:
    """The same inputs, every floating one a leaf that wants a gradient."""
    return {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}


def gradients(function: Callable[[Tensors], Any], inputs: Tensors, grad_out: Tensor) -> Tensors:
    """The gradient of every floating input."""
    leaves = leaves_of(inputs)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(output_of(function(leaves)), list(wanted.values()), grad_out)
    return dict(zip(wanted, found, strict=True))


def _at(operation: Operation, rows: Tensor) -> tuple[dict[str, Tensor], KeyRange]:
    """The inputs of a few queries, and what those see."""
    inputs = {}
    for name, x in operation.inputs.items():
        if name in PER_QUERY:
            x = x[:, rows]
        inputs[name] = x[:CHECKED_SEQUENCES] if x.dim() == 4 else x
    return inputs, KeyRange(None, operation.seen.last[:CHECKED_SEQUENCES, rows])


def _selection_error(
    operation: Operation, inputs: Tensors, seen: KeyRange, chosen: Tensor
) -> Error:
    """How far the true scores of the chosen blocks are from those of the best, of which they are a
    part."""
    with run_by("reference"):
        truth = operation.call(_wide(inputs), seen, return_block_scores=True)
    assert operation.block_size is not None
    scores = _plain_scores(inputs["q"], inputs["k"], seen, operation.block_size)
    best_plain = scores.topk(min(chosen.shape[-1], scores.shape[-1]), dim=-1)
    plain = best_plain.indices.masked_fill(best_plain.values == 0, -1)
    plain = torch.nn.functional.pad(plain, (0, chosen.shape[-1] - plain.shape[-1]), value=-1)
    best, ours, plains = (
        scores_of(idx, truth.block_scores) for idx in (truth.block_idx, chosen, plain)
    )
    kernel, eager = shortfall(ours, best), shortfall(plains, best)
    floor = torch.finfo(inputs["q"].dtype).eps
    return Error("selected scores", kernel, eager, FACTOR * eager + floor)


def _plain_scores(q: Tensor, k: Tensor, seen: KeyRange, block_size: int) -> Tensor:
    """Block scores (B, t, G, N) as eager attention in the inputs' dtype would have them."""
    logits = plain_logits(q, k, [visible_keys(seen, k)])
    weights = logits.softmax(-1, dtype=torch.float32).amax(3)
    padded = torch.nn.functional.pad(weights, (0, -k.shape[1] % block_size))
    return padded.reshape(*padded.shape[:-1], -1, block_size).amax(-1)


def _wide(inputs: Tensors) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
