"""Lists what differs between model families, a row each, and those that can never be right."""

from dataclasses import dataclass
from typing import Literal

from hysparse_cli.errors import UnsupportedModel
from hysparse_cli.printable import printable


@dataclass(frozen=True)
class Family:
    """attention: the module path of a layer's attention, ``{layer}`` its index.

    attention_norms: beside it, the norms of its input or output alone; None where the layer's MLP
    reads the same norm, so that attention can't move to another layer without it.
    output, value: the names below it of the output projection and of the one that gives values.
    fused: how that one holds the rows of queries and keys too: "by kind" (q, k, v) or "by head" (q,
    k, v of the first, of the second ...), or None.
    """

    attention: str = "model.layers.{layer}.self_attn"
    attention_norms: tuple[str, ...] | None = ("input_layernorm",)
    output: str = "o_proj"
    value: str = "v_proj"
    fused: Literal["by kind", "by head"] | None = None

    @property
    def decoder(self) -> str:
        return self.attention.partition(".")[0]

    @property
    def layer(self) -> str:
        """The module path of a decoder layer, with ``{layer}`` as in ``attention``."""
        return self.attention.rpartition(".")[0]


FAMILIES: dict[str, Family] = {
    "apertus": Family(attention_norms=("attention_layernorm",)),
    "arcee": Family(),
    "cohere": Family(attention_norms=None),
    "dots1": Family(),
    "ernie4_5": Family(),
    "gemma": Family(),
    "gemma2": Family(attention_norms=("input_layernorm", "post_attention_layernorm")),
    "glm": Family(),
    "glm4": Family(attention_norms=("input_layernorm", "post_self_attn_layernorm")),
    "glm4_moe": Family(),
    "gpt_neox": Family(
        attention="gpt_neox.layers.{layer}.attention",
        output="dense",
        value="query_key_value",
        fused="by head",
    ),
    "gpt_oss": Family(),
    "granite": Family(),
    "granitemoe": Family(),
    "helium": Family(),
    "hunyuan_v1_dense": Family(),
    "llama": Family(),
    "ministral": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "olmo": Family(),
    "olmo2": Family(attention_norms=("post_attention_layernorm",)),
    "olmoe": Family(),
    "phi": Family(attention_norms=None, output="dense"),
    "phi3": Family(value="qkv_proj", fused="by kind"),
    "qwen2": Family(),
    "qwen2_moe": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "seed_oss": Family(),
    "starcoder2": Family(),
}

_ROPE_BY_LAYER = (
    "its rotary embedding differs by layer, so a sparse layer's query would not fit the shared keys"
)
_NO_KWARGS = "its decoder does not hand keyword arguments to the attention layers"
_NO_ROPE = "it has no rotary attention of the kind HySparse shares between layers"
_LINEAR = "some of its layers are linear attention, which has no keys to share"

REFUSED: dict[str, str] = {
    "bloom": _NO_ROPE,
    "cohere2": _ROPE_BY_LAYER,
    "deepseek_v2": "its latent attention (MLA) keeps no keys and values to share",
    "deepseek_v3": "its latent attention (MLA) keeps no keys and values to share",
    "exaone4": _ROPE_BY_LAYER,
    "falcon": _NO_ROPE,
    "gemma3": _ROPE_BY_LAYER,
    "gemma3_text": _ROPE_BY_LAYER,
    "gpt2": _NO_ROPE,
    "llama4": _ROPE_BY_LAYER,
    "llama4_text": _ROPE_BY_LAYER,
    "mpt": _NO_ROPE,
    "nemotron": _NO_KWARGS,
    "olmo3": _ROPE_BY_LAYER,
    "opt": _NO_ROPE,
    "qwen3_next": _LINEAR,
    "smollm3": _ROPE_BY_LAYER,
    "stablelm": _NO_KWARGS,
}


def family_of(model_type: str) -> Family:
    """The row of ``model_type``, as in config.json.

    Raises: UnsupportedModel with the reason, or with the list of supported families.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise UnsupportedModel(f"{model_type} models can't become HySparse: {REFUSED[model_type]}")
    raise UnsupportedModel(
        f"model family {printable(repr(model_type))} is not supported; supported: "
        f"{', '.join(FAMILIES)}"
    )


def check_rope(rope_parameters: object) -> None:
    """Refuse rotary parameters that differ by layer type: shared keys need one rotation.

    Args:
        rope_parameters: as in config.json: a flat mapping, or one mapping a layer type, or None.
    Raises: UnsupportedModel where they are given by layer type and differ.
    """
    if not isinstance(rope_parameters, dict):
        return
    by_layer_type = [value for value in rope_parameters.values() if isinstance(value, dict)]
    if any(value != by_layer_type[0] for value in by_layer_type):
        raise UnsupportedModel(f"this model can't become HySparse: {_ROPE_BY_LAYER}")
