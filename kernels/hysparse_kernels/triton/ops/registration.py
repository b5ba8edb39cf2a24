"""Registers an op with torch.library from its forward and its backward, for autograd and compile.

A torch.library op takes tensors and numbers and returns tensors. So a key range goes through as its
fields, ``key_range_first`` and so on, and a result that is None as a tensor of size 0.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.library import custom_op

from hysparse_kernels.key_range import KeyRange

Function = Callable[..., Any]
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    bool: "bool",
}


class Arguments:
    """A function's arguments, by name or as the flat row that its torch.library op takes.

    places: name -> where it is in the flat row; of a key range, a slice. types: flat name -> its
    type in the op's schema.
    """

    def __init__(self, function: Function) -> None:
        hints = get_type_hints(function)
        hints.pop("return", None)
        self.places: dict[str, int | slice] = {}
        self.types: dict[str, str] = {}
        for name, hint in hints.items():
            begin = len(self.types)
            if hint is KeyRange:
                for field, of_field in get_type_hints(KeyRange).items():
                    self.types[f"{name}_{field}"] = SCHEMA_TYPES[of_field]
                self.places[name] = slice(begin, len(self.types))
            else:
                self.types[name] = SCHEMA_TYPES[hint]
                self.places[name] = begin

    def flat(self, named: dict[str, Any]) -> list[Any]:
        """The flat row of arguments by name."""
        row: list[Any] = []
        for name, place in self.places.items():
            row += (named[name],) if type(place) is int else named[name]
        return row

    def named(self, row: Sequence[Any]) -> dict[str, Any]:
        """The arguments by name of a flat row."""
        return {
            name: row[place] if type(place) is int else KeyRange(*row[place])
            for name, place in self.places.items()
        }

    def schema(self, num_results: int) -> str:
        listed = ", ".join(f"{schema_type} {name}" for name, schema_type in self.types.items())
        return f"({listed}) -> ({', '.join(['Tensor'] * num_results)})"


def register(
    name: str,
    forward: Function,
    backward: Function,
    *,
    shapes: Function,
    results: tuple[str, ...],
    gradients: tuple[str, ...],
) -> Function:
    """Register ``hysparse::name`` and ``hysparse::name_backward``.

    Args:
        forward: the op; every argument is annotated. Returns a tensor, or a tuple of tensors or
            None, as many as ``results``, contiguous.
        backward: takes ``d_out``, the gradient of the first result, and by their names what it
            needs of the forward's arguments and ``results``; only that is saved. Returns the
            gradients of the arguments named in ``gradients``, contiguous, or None.
        shapes: takes the forward's arguments and returns its results, unfilled.
    Returns: the op, which takes the forward's arguments by name and returns what it returns, with
        tensors of size 0 for None.
    """
    given, needed = Arguments(forward), Arguments(backward)

    def run(*row: Any) -> Any:
        return _tensors(forward(**given.named(row)), row[0])

    def fake(*row: Any) -> Any:
        return _tensors(shapes(**given.named(row)), row[0])

    op = custom_op(f"hysparse::{name}", run, mutates_args=(), schema=given.schema(len(results)))
    op.register_fake(fake)
    differentiate = _register_backward(name, backward, needed, gradients)
    saved = [n for n in needed.types if n != "d_out"]
    tensors = [n for n in saved if needed.types[n].startswith("Tensor")]
    options = [n for n in saved if n not in tensors]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        known = dict(zip(given.types, inputs, strict=True))
        known |= dict(zip(results, outputs, strict=True))
        ctx.save_for_backward(*(known[n] for n in tensors))
        ctx.options = [known[n] for n in options]

    def differentiated(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        known = dict(zip(tensors, ctx.saved_tensors, strict=True))
        known |= {"d_out": d_out} | dict(zip(options, ctx.options, strict=True))
        found = zip(gradients, differentiate(*(known[n] for n in needed.types)), strict=True)
        present = {n: gradient for n, gradient in found if known[n] is not None}
        return tuple(present.get(n) for n in given.types)

    op.register_autograd(differentiated, setup_context=keep)
    overload = getattr(torch.ops.hysparse, name).default

    def call(**named: Any) -> Any:
        return overload(*given.flat(named))

    return call


def _register_backward(
    name: str, backward: Function, needed: Arguments, gradients: tuple[str, ...]
) -> Function:
    def run(*row: Any) -> Any:
        named = needed.named(row)
        found = zip(gradients, backward(**named), strict=True)
        cast = (x if x is None else x.to(named[source].dtype) for source, x in found)
        return _tensors(tuple(cast), row[0])

    def fake(*row: Any) -> Any:
        named = needed.named(row)
        sources = (named[n] for n in gradients)
        return _tensors(tuple(x if x is None else x.new_empty(x.shape) for x in sources), row[0])

    schema = needed.schema(len(gradients))
    op = custom_op(f"hysparse::{name}_backward", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def _tensors(results: Tensor | Iterable[Tensor | None], like: Tensor) -> Any:
    if isinstance(results, Tensor):
        return results
    return tuple(like.new_empty(0) if x is None else x for x in results)


def attention_shapes(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of q (B, T, H, D) and v (B, S, G, Dv): out (B, T, H, Dv) and lse (B, T, H), unfilled."""
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, T, H, dtype=torch.float32)
