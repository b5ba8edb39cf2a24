"""Observes the attention of a model that is measured: times it in place, records it, or checks it.

The attention function alone is timed: queries, keys and values are projected, rotated and cached
before it, and the output projection comes after it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hysparse_cli.bench.exactness import AttentionCheck
from hysparse_cli.bench.timing import Marks
from hysparse_cli.model.attention import LayerCall
from hysparse_cli.model.logits import decoder_of
from hysparse_cli.model.state import ForwardOptions, ForwardState, Shared

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class AttentionPart:
    """The observer of all forwards of a model.

    marks: where begin and end of every call are noted, backward ones too; None where they are not.
    calls: every call, ready to be made again; None where they are not kept.
    check: sees what the calls were given and gave; None where nobody looks.
    lists: (1, T, G, K), which sparse layers attend to in place of what was selected for them; or
    None. The selection is computed all the same.

    Args:
        backend: of torch's SDPA, in a dense model; a name not in BACKENDS leaves the choice to
            torch.
    """

    def __init__(self, backend: str):
        self.backend = BACKENDS.get(backend)
        self.marks: Marks | None = None
        self.calls: list[LayerCall] | None = None
        self.check: AttentionCheck | None = None
        self.lists: Tensor | None = None

    def attach(self, model: Any) -> None:
        """Observe all forwards of ``model``; a dense one attends by ``dense_attention``."""

        def ask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"hysparse": ForwardOptions(observer=self)}

        decoder_of(model).register_forward_pre_hook(ask, prepend=True, with_kwargs=True)

    def __call__(self, call: LayerCall) -> Tensor:
        if self.lists is not None and call.state is not None:
            _publishes(call.state, self.lists)
        if self.calls is not None:
            self.calls.append(call)
        marks = self.marks
        if marks is not None:
            q, k, v = _Mark.apply(marks, call.q, call.k, call.v)  # type: ignore[no-untyped-call]
            call = call.replace(q=q, k=k, v=v)
            marks.mark()
        out = self.attend(call)
        if marks is not None:
            marks.mark()
            (out,) = _Mark.apply(marks, out)  # type: ignore[no-untyped-call]
        if self.check is not None:
            self.check.see(call, out, selected=self.lists is None)
        return out

    def attend(self, call: LayerCall) -> Tensor:
        """``call.attend()``; a dense layer's by torch's SDPA and nothing else.

        Raises: ValueError where SDPA would compute something else than the model.
        """
        if call.state is not None:
            return call.attend()
        _check_sdpa(call)
        if self.backend is None:
            return call.attend()
        with sdpa_kernel(self.backend):
            return call.attend()

    def repeat(self, calls: Sequence[LayerCall]) -> None:
        """Make the calls of one forward again, with a state that nothing is published in yet."""
        old, fresh = calls[0].state, None
        if old is not None:
            fresh = ForwardState(old.spec, old.num_keys, old.key_range, old.window_range)
        for call in calls:
            self.attend(call.replace(state=fresh))


def _check_sdpa(call: LayerCall) -> None:
    window = call.window_tokens
    needed = {
        "softcap": call.softcap is not None,
        "s_aux": call.sinks is not None,
        "sliding_window": window is not None and window < call.k.shape[1],
    }
    if missing := [name for name, is_needed in needed.items() if is_needed]:
        raise ValueError(f"SDPA has no {' and no '.join(missing)}, which this model needs")


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
