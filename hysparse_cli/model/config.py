"""The configuration of a HySparse model, on disk and in memory, without torch.

On disk ``model_type`` is "hysparse" and ``base_model_type`` the dense family's: under its own
family's name a checkpoint would silently load as the dense model. In memory it is a subclass of the
family's config class (see registration.py).
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from hysparse_cli.layout import Layout

MODEL_TYPE = "hysparse"
FORMAT_VERSION = 1
SINK_OFF = -10.0  # a sink's start: next to nothing, yet finite, or its gradient would be dead

HUB_SHIM_NAME = "hysparse_hub.py"
HUB_SHIM = '''"""Lets transformers find HySparse where it is installed: pip install hysparse."""

from hysparse_cli.model.registration import HySparseConfig

__all__ = ["HySparseConfig"]
'''


@dataclass(frozen=True)
class HysparseSpec:
    """What makes a checkpoint HySparse: the ``hysparse`` section of its config.json.

    pattern: one letter a layer (layout.py). layout: "hysparse"; "hybrid-swa" has no block-sparse
    branch; "full" is the dense model. sparse_kv: whose keys and values the block-sparse branch
    reads, the server's ("shared") or the layer's own ("own", the paper's Table 4 ablation).
    """

    pattern: str
    layout: Literal["hysparse", "hybrid-swa", "full"] = "hysparse"
    block_size: int = 64
    top_k_tokens: int = 1024
    window_tokens: int = 128
    sparse_kv: Literal["shared", "own"] = "shared"
    version: int = FORMAT_VERSION

    @cached_property
    def layers(self) -> Layout:
        return Layout(self.pattern)

    @property
    def top_k_blocks(self) -> int:
        return self.top_k_tokens // self.block_size

    @property
    def num_branches(self) -> int:
        """Attention branches of a sparse layer: block-sparse and SWA, or SWA alone."""
        return 1 if self.layout == "hybrid-swa" else 2

    @property
    def layer_types(self) -> list[str]:
        """transformers' name for what each layer's cache keeps: all tokens, or a window of them."""
        sparse = "full_attention" if self.sparse_kv == "own" else "sliding_attention"
        return ["full_attention" if kind == "F" else sparse for kind in self.pattern]


@dataclass(frozen=True)
class NewTensor:
    """A tensor that a sparse layer adds, and the value it starts from."""

    shape: tuple[int, ...]
    fill: float


def new_tensors(
    num_heads: int, hidden_size: int, spec: HysparseSpec, *, own_sinks: bool = False
) -> dict[str, NewTensor]:
    """What a sparse layer adds, by name below its attention module.

    Gate rows are head-major: 2h is head h's block-sparse gate, 2h + 1 its SWA gate (eq. 8).

    Args:
        own_sinks: the family has sinks of its own (gpt_oss), which ours are added to.
    """
    sinks = NewTensor((num_heads, spec.num_branches), 0.0 if own_sinks else SINK_OFF)
    if spec.num_branches == 1:
        return {"hysparse.sinks": sinks}
    return {
        "hysparse.gate.weight": NewTensor((2 * num_heads, hidden_size), 0.0),
        "hysparse.gate.bias": NewTensor((2 * num_heads,), 0.0),
        "hysparse.sinks": sinks,
    }


def converted_config(base: dict[str, Any], spec: HysparseSpec) -> dict[str, Any]:
    """The config.json of the checkpoint that ``base``'s model becomes."""
    config = {**base, "model_type": MODEL_TYPE, "base_model_type": base["model_type"]}
    config["architectures"] = [f"HySparse{name}" for name in base.get("architectures") or []]
    config["auto_map"] = {"AutoConfig": f"{HUB_SHIM_NAME.removesuffix('.py')}.HySparseConfig"}
    config["hysparse"] = asdict(spec)
    if spec.layers.sparse_layers:
        config["layer_types"] = spec.layer_types
        config["sliding_window"] = spec.window_tokens
        if "attention_dropout" in config:  # HySparse attention has none
            config["attention_dropout"] = 0.0
    return config


def spec_of(config: Any) -> HysparseSpec | None:
    """The spec of a transformers config or of a config.json's contents; None for a dense model.

    Raises: ValueError where a newer hysparse wrote it.
    """
    section = config.get("hysparse") if isinstance(config, dict) else vars(config).get("hysparse")
    if section is None:
        return None
    if section.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"hysparse.version in config.json is {section.get('version')!r}, but this hysparse "
            f"reads version {FORMAT_VERSION}: install a newer hysparse"
        )
    return HysparseSpec(**section)
