"""A new rotary base and a longer input in config.json, for healing at a longer context."""

from typing import Any

from hysparse_cli.errors import UnsupportedModel
from hysparse_cli.recipe import ConvertOptions

_LONGEST = "max_position_embeddings"
_BASES = ("rope_theta", "rotary_emb_base")  # gpt_neox has the latter


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
    for name in ("rope_parameters", "rope_scaling"):
        scaling = new.get(name)
        for part in _parts(scaling):
            kind = part.get("rope_type", part.get("type", "default"))
            if kind != "default":
                raise UnsupportedModel(
                    f"config.json has {name} of type {kind!r}, worked out for the base and length "
                    "it has: leave rope_theta and max_position_embeddings out"
                )
    if options.rope_theta is not None:
        for name in _BASES:
            if name in new:
                new[name] = options.rope_theta
        parameters = new.get("rope_parameters")
        if isinstance(parameters, dict):
            new["rope_parameters"] = _with_base(parameters, options.rope_theta)
        elif not any(name in new for name in _BASES):
            new["rope_theta"] = options.rope_theta
    return new


def _parts(rope: Any) -> list[dict[str, Any]]:
    """The mappings of rope parameters: one, or one for each layer type."""
    if not isinstance(rope, dict):
        return []
    return [part for part in rope.values() if isinstance(part, dict)] or [rope]


def _with_base(rope: dict[str, Any], rope_theta: float) -> dict[str, Any]:
    if any(isinstance(part, dict) for part in rope.values()):
        return {
            name: {**part, "rope_theta": rope_theta} if isinstance(part, dict) else part
            for name, part in rope.items()
        }
    return {**rope, "rope_theta": rope_theta}
