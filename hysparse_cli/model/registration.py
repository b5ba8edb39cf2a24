"""Teaches transformers' auto classes to load HySparse checkpoints.

For each base family a config class and a model class are derived from the stock ones on first use.
In memory the config's ``model_type`` stays the base's, so that everything transformers keys on it
(tensor-parallel plans, weight conversion, peft) goes on working; ``to_dict`` writes "hysparse".
"""

from functools import cache
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hysparse_cli.errors import UnreadableInput
from hysparse_cli.families import check_rope, family_of
from hysparse_cli.model.config import (
    HUB_SHIM,
    HUB_SHIM_NAME,
    MODEL_TYPE,
    spec_of,
)

_OURS = ("model_type", "base_model_type", "hysparse")
_OURS_WHERE_SPARSE = ("layer_types", "sliding_window")


class HySparseConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What "hysparse" in a config.json names; reading one yields the base family's subclass."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The in-memory config of a converted checkpoint.

        Raises: UnsupportedModel for a base family that is not supported; ValueError for a section
            this version can't read; UnreadableInput for one that no version has written.
        """
        family = config_dict.get("base_model_type")
        if not isinstance(family, str) or config_dict.get("hysparse") is None:
            raise UnreadableInput(
                f"config.json has model_type {MODEL_TYPE}, but no base_model_type or no section "
                f"{MODEL_TYPE}: convert the dense checkpoint again"
            )
        return config_class(family).from_dict(config_dict, **kwargs)


@cache
def config_class(base_model_type: str) -> type[PreTrainedConfig]:
    """The HySparse subclass of a family's config class, known to the auto classes.

    Raises: UnsupportedModel for a family that is not supported.
    """
    family_of(base_model_type)
    base = CONFIG_MAPPING[base_model_type]
    subclass: type[PreTrainedConfig] = type(
        f"HySparse{base.__name__}", (_FromBase, base), {"__module__": __name__}
    )
    from hysparse_cli.model.modeling import register_models

    register_models(subclass, base)
    return subclass


class _FromBase:
    """What a HySparse config adds to the stock config class it is mixed into."""

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """With the model_type that the config has in memory, which transformers compares with the
        class's own: peft reads a base model's config by its class."""
        found, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return {**found, "model_type": found.get("base_model_type", found.get("model_type"))}, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        spec = spec_of(config_dict)
        assert spec is not None, "a hysparse config.json has a hysparse section"
        sparse = bool(spec.layers.sparse_layers)
        ours = _OURS + _OURS_WHERE_SPARSE if sparse else _OURS
        base = {key: value for key, value in config_dict.items() if key not in ours}
        built = super().from_dict(base, **kwargs)  # type: ignore[misc]
        config = built[0] if isinstance(built, tuple) else built
        check_rope(getattr(config, "rope_parameters", None))
        if len(spec.pattern) != config.num_hidden_layers:
            raise UnreadableInput(
                f"hysparse.pattern in config.json has {len(spec.pattern)} letters, but there "
                f"are {config.num_hidden_layers} layers (num_hidden_layers): "
                "convert the dense checkpoint again"
            )
        config.hysparse = config_dict["hysparse"]
        if sparse:  # after construction: some families' constructors overwrite them
            config.layer_types = spec.layer_types
            config.sliding_window = spec.cache_window_tokens
        return built

    def to_dict(self) -> dict[str, Any]:
        base_model_type = type(self).model_type  # type: ignore[attr-defined]
        written: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return written | {"model_type": MODEL_TYPE, "base_model_type": base_model_type}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / HUB_SHIM_NAME).write_text(HUB_SHIM, encoding="utf-8")
