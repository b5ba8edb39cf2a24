"""Aligns sparse layers with a dense teacher's, each fed what the dense layer reads.

Every student layer gets the teacher's hidden states instead of those of the layer before, so that
a layer's error is its own. The hooks stay on the model, since gradient checkpointing runs layers
again in the backward pass; they do nothing in a forward without a ``Recording``, which travels as
a keyword argument, as the state of a HySparse forward does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hysparse_cli.families import family_of
from hysparse_cli.finetune.context_parallel import LocalBatch
from hysparse_cli.finetune.losses import LossSums, relative_error, weighted
from hysparse_cli.model.config import spec_of

_KEYWORD = "hysparse_align"
_HOOKED = "_hysparse_align_hooked"


class Recording:
    """What the teacher's layers read and gave in one forward, and what the student made of it.

    inputs: each layer's hidden states. outputs: by sparse layer, its attention module's output.
    errors: by sparse layer, the student's relative squared error. (B, t, hidden) each; (B,).
    """

    def __init__(self, batch: LocalBatch) -> None:
        self.batch = batch
        self.inputs: list[Tensor] = []
        self.outputs: dict[int, Tensor] = {}
        self.errors: dict[int, Tensor] = {}
        self.carried: Tensor | None = None


def align_sums(model: Any, batch: LocalBatch, teacher: Any) -> LossSums:
    """How far the sparse layers' attention is from the teacher's.

        align = sum over rows of n mean over sparse layers of ||o - o'||^2 / ||o'||^2

    with o the attention module's output (after its output projection), norms over a row and n its
    targets. Full layers run for the keys and values they serve; nothing holds their own output to
    the teacher's.

    Args:
        teacher: the dense model; its layers correspond to ``model``'s one by one.
    """
    spec = spec_of(model.config)
    assert spec is not None and spec.layers.sparse_layers, "check_objectives looks before"
    sparse = spec.layers.sparse_layers
    with torch.no_grad(), _recorded(teacher, sparse, batch) as recording:
        batch.last_states(teacher)
    if not getattr(model, _HOOKED, False):
        _hook(model, sparse)
        setattr(model, _HOOKED, True)
    last = batch.last_states(model, **{_KEYWORD: recording})
    align = weighted(batch, [recording.errors[layer] for layer in sparse])
    align = align + last[:0].float().sum()
    return LossSums(align, {"align_loss": align})


def _after(value: Tensor, earlier: Tensor) -> Tensor:
    out: Tensor = _After.apply(value, earlier)  # type: ignore[no-untyped-call]
    return out


class _After(torch.autograd.Function):
    """``value``, computed "after" ``earlier``: a backward pass gets to ``earlier`` through it.

    FSDP2 gathers a layer's parameters when a gradient reaches the layer's output and frees them
    when one leaves its input. Losses that are taken inside of layers bypass both, so each layer's
    output depends on its loss, and its input on the layer before, with gradients of zero.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, earlier: Tensor) -> Tensor:
        ctx.like = earlier.shape, earlier.dtype, earlier.device
        return value.clone()  # FSDP2's hooks want no view

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        shape, dtype, device = ctx.like
        return None, torch.zeros(shape, dtype=dtype, device=device)


@contextmanager
def _recorded(teacher: Any, sparse: Sequence[int], batch: LocalBatch) -> Iterator[Recording]:
    """Record the teacher's forward inside, over ``batch``."""
    recording, handles = Recording(batch), []

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.inputs.append(args[0] if args else kwargs["hidden_states"])

    def gave(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            recording.outputs[layer] = _first(output)

        return hook

    family = family_of(teacher.config.model_type)
    for layer in range(teacher.config.num_hidden_layers):
        decoder_layer = teacher.get_submodule(family.layer.format(layer=layer))
        handles.append(decoder_layer.register_forward_pre_hook(read, with_kwargs=True))
    for layer in sparse:
        attention = teacher.get_submodule(family.attention.format(layer=layer))
        handles.append(attention.register_forward_hook(gave(layer)))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _hook(model: Any, sparse: Sequence[int]) -> None:
    """Let the model's layers do as a forward's ``Recording`` says, if it has one."""
    family = family_of(model.config.model_type)
    for layer in range(model.config.num_hidden_layers):
        decoder_layer = model.get_submodule(family.layer.format(layer=layer))
        hooks = _LayerHooks(layer, is_sparse=layer in sparse)
        decoder_layer.register_forward_pre_hook(hooks.before, with_kwargs=True)
        # before FSDP2's own, which must see what comes out
        decoder_layer.register_forward_hook(hooks.after, with_kwargs=True, prepend=True)
        if layer in sparse:
            attention = model.get_submodule(family.attention.format(layer=layer))
            attention.register_forward_hook(hooks.attended, with_kwargs=True)


class _LayerHooks:
    def __init__(self, layer: int, is_sparse: bool):
        self.layer, self.is_sparse = layer, is_sparse

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        recording: Recording | None = kwargs.get(_KEYWORD)
        if recording is None:
            return None
        carried = args[0] if args else kwargs["hidden_states"]
        read = recording.inputs[self.layer].to(carried.dtype)
        if self.is_sparse:
            read = _after(read, carried)
        else:
            recording.carried = carried
        if args:
            return (read, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": read}

    def attended(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        recording: Recording | None = kwargs.get(_KEYWORD)
        if recording is not None:
            target = recording.outputs[self.layer]
            error = relative_error(_first(output), target, recording.batch)
            recording.errors.setdefault(self.layer, error)  # checkpointing comes here twice

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        recording: Recording | None = kwargs.get(_KEYWORD)
        if recording is None:
            return None
        earlier = recording.errors[self.layer] if self.is_sparse else recording.carried
        assert earlier is not None, "before ran before"
        carried = _after(_first(output).detach(), earlier)
        return (carried, *output[1:]) if isinstance(output, tuple) else carried


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
