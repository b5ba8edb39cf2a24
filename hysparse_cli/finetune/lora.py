"""Low-rank adapters of the attention projections, by peft, instead of training their weights.

What the conversion added (gates, sinks) is small and is trained in full beside them. In the
checkpoint that is written the adapters are part of the weights: it is a plain HySparse checkpoint.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.finetune.weights import ADAPTER, NEW, attention_names
from hysparse_cli.recipe import FinetuneOptions

_DOWN, _UP = ".lora_A.", ".lora_B."
_SPARSE_ONLY = {"sparse-attention", "new"}


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
