"""The attention calls of a model, seen from outside: passed on, timed in place, or recorded.

transformers' layers look their attention function up by name. What is timed is that function alone:
queries, keys and values are projected, rotated and cached before it, and the output projection
comes after it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import AttentionInterface

import hysparse_cli.model.modeling  # noqa: F401 - registers the attention that we stand in for
from hysparse_cli.bench.exactness import AttentionCall, AttentionCheck
from hysparse_cli.bench.timing import Marks
from hysparse_cli.model.attention import ATTENTION_NAME, hysparse_attention
from hysparse_cli.model.state import ForwardState, Shared

DENSE_NAME = "hysparse_bench_dense"
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
NOT_IN_SDPA = ("softcap", "s_aux")


class AttentionPart:
    """transformers' attention function of one kind of model, with ears.

    marks: where begin and end of every call are noted, backward ones too; None where they are not.
    calls: what every call was, ready to be made again; None where they are not kept.
    witness: sees what the calls were given and gave; None where nobody looks.
    lists: (1, T, G, K), which sparse layers attend to in place of what was selected for them; or
    None. The selection is computed all the same.
    """

    def __init__(self, attend: Callable[..., Any]):
        self.attend = attend
        self.marks: Marks | None = None
        self.calls: list[Callable[[], Any]] | None = None
        self.witness: AttentionCheck | None = None
        self.lists: Tensor | None = None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Any:
        if self.lists is not None and (state := options.get("hysparse")) is not None:
            _publishes(state, self.lists)
        if self.calls is not None:
            self.calls.append(partial(self.attend, module, query, key, value, mask, **options))
        marks = self.marks
        if marks is not None:
            query, key, value = _Mark.apply(marks, query, key, value)  # type: ignore[no-untyped-call]
            marks.mark()
        out, weights = self.attend(module, query, key, value, mask, **options)
        if marks is not None:
            marks.mark()
            (out,) = _Mark.apply(marks, out)  # type: ignore[no-untyped-call]
        if self.witness is not None:
            selected = self.lists is None
            call = AttentionCall(module, query, key, value, options, out, selected)
            self.witness.see(call)
        return out, weights


def record_attention(is_dense: bool, backend: str) -> AttentionPart:
    """Stand in for the attention of all HySparse models of this process, or of its dense ones."""
    if is_dense:
        part = AttentionPart(partial(dense_attention, backend=BACKENDS.get(backend)))
        AttentionInterface.register(DENSE_NAME, part)
    else:
        part = AttentionPart(hysparse_attention)
        AttentionInterface.register(ATTENTION_NAME, part)
    return part


def dense_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    backend: SDPBackend | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """torch's SDPA without a mask: causal over a whole text, or all keys for one query.

    Args: query: (B, H, T, D). key, value: (B, G, S, D). backend: None leaves the choice to torch.
    Returns: (B, T, H, D), and no weights.
    Raises: ValueError where SDPA would compute something else than the model.
    """
    missing = [name for name in NOT_IN_SDPA if options.get(name) is not None]
    if sliding_window is not None and sliding_window < key.shape[2]:
        missing.append("sliding_window")
    if missing:
        raise ValueError(f"SDPA has no {' and no '.join(missing)}, which this model needs")
    call = partial(
        F.scaled_dot_product_attention,
        *(query, key, value),
        is_causal=query.shape[2] > 1,
        scale=scaling,
        enable_gqa=True,
    )
    if backend is None:
        out = call()
    else:
        with sdpa_kernel(backend):
            out = call()
    return out.transpose(1, 2).contiguous(), None


def _publishes(state: ForwardState, lists: Tensor) -> None:
    """Let ``state`` hand on ``lists`` in place of what full layers select."""

    def publish(full_layer: int, shared: Shared) -> None:
        batch = shared.block_idx.shape[0]
        given = shared._replace(block_idx=lists.expand(batch, -1, -1, -1))
        ForwardState.publish(state, full_layer, given)

    state.publish = publish  # type: ignore[method-assign]


class _Mark(torch.autograd.Function):
    """The identity, which notes when its gradient passes: the end of a backward, or its begin."""

    @staticmethod
    def forward(ctx: Any, marks: Marks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.marks = marks
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.marks.mark()
        return None, *gradients
