"""Preparing a model for rows that several processes split (model/split.py has how)."""

from typing import Any

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.families import family_of
from hysparse_cli.model.config import spec_of
from hysparse_cli.model.context_parallel import SPLIT
from hysparse_cli.model.kv_cache import kv_cache_of

_LENGTH_DEPENDENT = ("dynamic", "longrope")
_SEES_OTHER_DOCUMENTS = ("gpt_oss",)  # transformers makes its mask without position_ids


def prepare_rows(model: Any, name: str, num_processes: int, *, trained: bool) -> None:
    """``split_rows`` where several processes split them, or a dense model can't tell documents."""
    dense = spec_of(model.config) is None
    if num_processes > 1 or (dense and model.config.model_type in _SEES_OTHER_DOCUMENTS):
        split_rows(model, name, num_processes, trained=trained)


def split_rows(model: Any, name: str, num_processes: int, *, trained: bool) -> None:
    """Let ``model``, dense or converted, see rows that ``num_processes`` split.

    Args:
        trained: whether the model is, and so drops out what its config.json says.
    Raises: InvalidRecipe where it can't be right; UnsupportedModel where the family is not known.
    """
    config = model.config
    family_of(config.model_type)
    problem = None
    num_kv_heads = kv_cache_of(config).num_kv_heads
    rope = getattr(config, "rope_parameters", None) or {}
    if num_kv_heads % num_processes:
        problem = (
            f"{name} has {num_kv_heads} KV heads, which so many processes can't share evenly: use "
            "a divisor of them"
        )
    elif trained and getattr(config, "attention_dropout", None):
        problem = (
            f"{name} drops out {config.attention_dropout} of its attention (attention_dropout in "
            "its config.json), which attention over split rows does not: set it to 0, or leave "
            "this out"
        )
    elif rope.get("rope_type") in _LENGTH_DEPENDENT:
        problem = (
            f"{name} rotates by the length of a row ({rope['rope_type']} in its config.json), of "
            "which a process sees a part alone: leave this out"
        )
    if problem is not None:
        raise InvalidRecipe(f"finetune.sequence_parallel_size is {num_processes}, but {problem}")
    config._attn_implementation = SPLIT
