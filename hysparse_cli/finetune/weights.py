"""What is trained: a group of parameters, and which of them decay."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.families import family_of
from hysparse_cli.model.config import spec_of

NEW, ADAPTER = ".hysparse.", ".lora_"  # in the names of parameters


def select_trainable(model: Any, group: str) -> dict[str, nn.Parameter]:
    """Let gradients reach the parameters of ``group`` only, and return them by name.

    In a model with adapters (lora.py) those are the adapters in the group, and what is new.

    Args:
        group: "all"; "attention": everything below an attention module; "sparse-attention": that
            of sparse layers; "new": what the conversion added.
    Raises: InvalidRecipe where the model has none; UnsupportedModel where its family's attention is
        not known.
    """
    belongs = _GROUPS[group](model)
    adapted = any(ADAPTER in name for name, _ in model.named_parameters())
    chosen = {}
    for name, parameter in model.named_parameters():
        weight = adapted and ADAPTER not in name and NEW not in name
        parameter.requires_grad_(belongs(name) and not weight)
        if parameter.requires_grad:
            chosen[name] = parameter
    if not chosen:
        raise InvalidRecipe(
            f"finetune.trainable is {group!r}, but the model has no such parameters: it is dense, "
            "or has only full layers; use 'all' or 'attention'"
        )
    return chosen


def attention_places(model: Any, *, sparse_only: bool) -> tuple[str, ...]:
    """What the names of everything in the model's attention modules, or sparse ones, begin with."""
    spec = spec_of(model.config)
    layers: Iterable[int] = range(model.config.num_hidden_layers)
    if sparse_only:
        layers = () if spec is None else spec.layers.sparse_layers
    path = family_of(model.config.model_type).attention
    return tuple(f"{path.format(layer=layer)}." for layer in layers)


def decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
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
    places = attention_places(model, sparse_only=False)
    return lambda name: name.startswith(places)


def _sparse_attention(model: Any) -> Callable[[str], bool]:
    places = attention_places(model, sparse_only=True)
    return lambda name: name.startswith(places)


def _new(model: Any) -> Callable[[str], bool]:
    return lambda name: NEW in name


_GROUPS: dict[str, Callable[[Any], Callable[[str], bool]]] = {
    "all": _all,
    "attention": _attention,
    "sparse-attention": _sparse_attention,
    "new": _new,
}
