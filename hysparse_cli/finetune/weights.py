"""What is trained: a group of parameters, and which of them decay."""

import re
from collections.abc import Callable
from functools import partial
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
    belongs = in_group(model.config, group)
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


def in_group(config: Any, group: str) -> Callable[[str], bool]:
    """Whether a parameter of this name is in ``group``.

    Args:
        config: a transformers config, or its values as attributes.
    Raises: UnsupportedModel where the group is of attention and the family's is not known.
    """
    return _GROUPS[group](config)


def attention_names(config: Any, *, sparse_only: bool) -> Callable[[str], bool]:
    """Whether a name is of something in an attention module, or one of a sparse layer.

    Raises: UnsupportedModel where the family's attention is not known.
    """
    path = re.escape(family_of(config.model_type).attention)
    place = re.compile(path.replace(re.escape("{layer}"), r"(\d{1,9})") + r"\.")
    spec = spec_of(config)
    sparse = set() if spec is None else set(spec.layers.sparse_layers)

    def belongs(name: str) -> bool:
        found = place.match(name)
        return found is not None and (not sparse_only or int(found[1]) in sparse)

    return belongs


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


_GROUPS: dict[str, Callable[[Any], Callable[[str], bool]]] = {
    "all": lambda config: lambda name: True,
    "attention": partial(attention_names, sparse_only=False),
    "sparse-attention": partial(attention_names, sparse_only=True),
    "new": lambda config: lambda name: NEW in name,
}
