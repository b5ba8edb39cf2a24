"""Puts a new rotary base and a longer input into config.json, for healing at a longer context."""

from typing import Any

from hysparse_cli.errors import UnsupportedModel
from hysparse_cli.printable import printable
from hysparse_cli.recipe import ConvertOptions

_PARAMETERS, _LONGEST = "rope_parameters", "max_position_embeddings"
_BASE, _GPT_NEOX_BASE = "rope_theta", "rotary_emb_base"


def with_positions(config: dict[str, Any], options: ConvertOptions) -> dict[str, Any]:
    """``config`` with the options' ``rope_theta`` and ``max_position_embeddings``, where given.

    transformers 5 keeps the base in ``rope_parameters`` (a mapping, or one for each layer type),
    earlier ones beside it; every place that is there is set, and where there is none, the default
    that the family's class has is replaced.

    Raises: UnsupportedModel where positions are rescaled besides (YaRN and the like), which was
        worked out for the old base and length.
    """
    if options.rope_theta is None and options.max_position_embeddings is None:
        return config
    new = dict(config)
    if options.max_position_embeddings is not None:
        new[_LONGEST] = options.max_position_embeddings
    for name in (_PARAMETERS, "rope_scaling"):
        for part in _parts(config.get(name)):
            kind = part.get("rope_type", part.get("type", "default"))
            if kind != "default":
                raise UnsupportedModel(
                    f"config.json has {name} of type {printable(repr(kind))}, worked out for the "
                    "base and length it has: leave rope_theta and max_position_embeddings out"
                )
    if options.rope_theta is not None:
        places = {name for name in (_BASE, _GPT_NEOX_BASE) if name in config}
        if isinstance(rope := config.get(_PARAMETERS), dict):
            new[_PARAMETERS] = _with_base(rope, options.rope_theta)
        elif not places:
            places = {_GPT_NEOX_BASE if config.get("model_type") == "gpt_neox" else _BASE}
        new |= dict.fromkeys(places, options.rope_theta)
    return new


def _parts(rope: Any) -> list[dict[str, Any]]:
    """The mappings of rope parameters: one, or one for each layer type."""
    if not isinstance(rope, dict):
        return []
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _with_base(rope: dict[str, Any], rope_theta: float) -> dict[str, Any]:
    if any(isinstance(part, dict) for part in rope.values()):
        return {
            name: {**part, _BASE: rope_theta} if isinstance(part, dict) else part
            for name, part in rope.items()
        }
    return {**rope, _BASE: rope_theta}
