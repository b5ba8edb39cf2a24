"""Selects what is trained: a group of parameters, or low-rank adapters (peft) in their place.

Adapters are of the attention projections. What the conversion added (gates, sinks) is small and is
trained in full beside them. In the checkpoint that is written the adapters are part of the weights:
it is a plain HySparse checkpoint.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.families import family_of
from hysparse_cli.model.config import spec_of
from hysparse_cli.recipe import FinetuneOptions

NEW, ADAPTER = ".hysparse.", ".lora_"  # in the names of parameters
_DOWN, _UP = ".lora_A.", ".lora_B."
_SPARSE_ONLY = {"sparse-attention", "new"}


def select_trainable(model: Any, group: str) -> dict[str, nn.Parameter]:
    """Let gradients reach the parameters of ``group`` only, and return them by name.

    In a model with adapters those are the adapters in the group, and what is new.

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


def check_peft(options: FinetuneOptions) -> None:
    """Raises: InvalidRecipe where the options want adapters and peft is not installed."""
    if options.lora_rank is None:
        return
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InvalidRecipe(
            "finetune.lora_rank needs the package peft: pip install 'hysparse[lora]'"
        ) from None


def add_adapters(model: Any, options: FinetuneOptions) -> None:
    """Put adapters, which change nothing at first, on the projections that any stage trains.

    Raises: InvalidRecipe where there are none: a dense model has no sparse layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    assert options.lora_rank is not None
    belongs = attention_names(model.config, sparse_only=adapts_sparse_only(options))
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and belongs(name) and NEW not in name
    ]
    if not targets:
        raise InvalidRecipe(
            "finetune.lora_rank with trainable sparse-attention, but the model has no sparse layers"
        )
    config = LoraConfig(
        r=options.lora_rank, lora_alpha=_alpha(options), target_modules=targets, lora_dropout=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)  # the same in every process
        inject_adapter_in_model(config, model)


def adapts_sparse_only(options: FinetuneOptions) -> bool:
    """Whether no stage trains the attention of full layers."""
    return {stage.trainable for stage in options.resolved_stages()} <= _SPARSE_ONLY


def merged(
    trained: Mapping[str, Tensor], model: Any, options: FinetuneOptions
) -> dict[str, Tensor]:
    """What was trained as weights of ``model``, which has no adapters: each is added to its weight.

    Args:
        trained: name -> float32, the adapters among them.
    """
    weights = {name: weight for name, weight in trained.items() if ADAPTER not in name}
    for name, down in trained.items():
        place, is_down, _ = name.partition(_DOWN)
        if is_down:
            assert options.lora_rank is not None
            up = trained[name.replace(_DOWN, _UP)]  # [out, rank]; down is [rank, in]
            scale = _alpha(options) / options.lora_rank
            weights[f"{place}.weight"] = model.get_parameter(f"{place}.weight") + scale * up @ down
    return weights


def _alpha(options: FinetuneOptions) -> int:
    assert options.lora_rank is not None
    return 2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha


_GROUPS: dict[str, Callable[[Any], Callable[[str], bool]]] = {
    "all": lambda config: lambda name: True,
    "attention": partial(attention_names, sparse_only=False),
    "sparse-attention": partial(attention_names, sparse_only=True),
    "new": lambda config: lambda name: NEW in name,
}
