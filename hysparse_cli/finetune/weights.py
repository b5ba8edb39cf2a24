"""What is trained: a group of parameters, and which of them decay."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.families import family_of
from hysparse_cli.model.config import spec_of

_NEW = ".hysparse."


def select_trainable(model: Any, group: str) -> dict[str, nn.Parameter]:
    """Let gradients reach the parameters of ``group`` only, and return them by name.

    Args:
        group: "all"; "attention": everything below an attention module; "sparse-attention": that
            of sparse layers; "new": what the conversion added.
    Raises: InvalidRecipe where the model has none; UnsupportedModel where its family's attention is
        not known.
    """
    belongs = _GROUPS[group](model)
    chosen = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(belongs(name))
        if parameter.requires_grad:
            chosen[name] = parameter
    if not chosen:
        raise InvalidRecipe(
            f"finetune.trainable is {group!r}, but the model has no such parameters: it is dense, "
            "or has only full layers; use 'all' or 'attention'"
        )
    return chosen


def decay_groups(
    parameters: dict[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimiser groups: matrices decay; vectors and sinks, which are biases, do not."""
    decays = {n: p.dim() > 1 and not n.endswith(".sinks") for n, p in parameters.items()}
    return [
        {
            "params": [p for n, p in parameters.items() if decays[n] is decayed],
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]


def _all(model: Any) -> Callable[[str], bool]:
    return lambda name: True


def _attention(model: Any) -> Callable[[str], bool]:
    return _below_attention(model, range(model.config.num_hidden_layers))


def _sparse_attention(model: Any) -> Callable[[str], bool]:
    spec = spec_of(model.config)
    return _below_attention(model, () if spec is None else spec.layers.sparse_layers)


def _below_attention(model: Any, layers: Iterable[int]) -> Callable[[str], bool]:
    path = family_of(model.config.model_type).attention
    places = tuple(f"{path.format(layer=layer)}." for layer in layers)
    return lambda name: name.startswith(places)


def _new(model: Any) -> Callable[[str], bool]:
    return lambda name: _NEW in name


_GROUPS: dict[str, Callable[[Any], Callable[[str], bool]]] = {
    "all": _all,
    "attention": _attention,
    "sparse-attention": _sparse_attention,
    "new": _new,
}
