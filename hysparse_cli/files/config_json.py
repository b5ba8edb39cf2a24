"""Checks what a config.json says, before transformers builds anything from it.

transformers takes much of it as it comes: a count of a billion layers it builds, a name of one of
its own methods it overwrites, an attention kernel of the hub it downloads and runs.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hysparse_cli.errors import UnreadableInput, UnsupportedModel
from hysparse_cli.printable import printable, single_line

MOST_DEPTH = 20
MOST_BYTES = 4 << 20
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# each also with leading underscores and with _internal behind
_KERNEL_CHOICES = ("attn_implementation", "experts_implementation")
# what says how a model is run or what else it was used for, and nothing about its weights
SWITCHES = frozenset(
    (
        *("num_labels", "id2label", "label2id", "problem_type", "finetuning_task"),
        *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states"),
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_weights"),
        *("chunk_size_feed_forward", "gradient_checkpointing", "is_encoder_decoder"),
        *("add_cross_attention", "cross_attention_hidden_size", "torchscript", "pruned_heads"),
        *("keys_to_ignore_at_inference", "quantization_config", "is_composition"),
    )
)

Size = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Epsilon = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=-1e6, le=1e6)]
Divisor = Annotated[float, Field(ge=1e-6, le=1e6)]
Dtype = Literal["float64", "float32", "bfloat16", "float16", "double", "float", "half"]
Tokens = Annotated[int, Field(ge=-1)] | list[Annotated[int, Field(ge=-1)]]


class _Known(BaseModel):
    """The fields that a supported family's model depends on; all others are left alone."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)] | None = None
    vocab_size: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size | None = None
    original_max_position_embeddings: Size | None = None
    sliding_window: Size | Literal[False] | None = None
    layer_types: list[str] | None = None
    moe_intermediate_size: Size | None = None
    shared_expert_intermediate_size: Count | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    n_routed_experts: Count | None = None
    n_shared_experts: Count | None = None
    num_experts_per_tok: Size | None = None
    decoder_sparse_step: Size | None = None
    rms_norm_eps: Epsilon | None = None
    layer_norm_eps: Epsilon | None = None
    norm_epsilon: Epsilon | None = None
    initializer_range: Annotated[float, Field(ge=0, le=1e6)] | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    rotary_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    attention_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    attention_multiplier: Factor | None = None
    residual_multiplier: Factor | None = None
    embedding_multiplier: Factor | None = None
    logit_scale: Factor | None = None
    routed_scaling_factor: Factor | None = None
    logits_scaling: Divisor | None = None
    query_pre_attn_scalar: Divisor | None = None
    final_logit_softcapping: Divisor | None = None
    attn_logit_softcapping: Divisor | None = None
    clip_qkv: Annotated[float, Field(gt=0)] | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    tie_word_embeddings: bool | None = None
    use_cache: bool | None = None
    pad_token_id: Annotated[int, Field(ge=-1)] | None = None
    bos_token_id: Tokens | None = None
    eos_token_id: Tokens | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: Annotated[float, Field(gt=0, le=1e15)] | None = None
    rotary_emb_base: Annotated[float, Field(gt=0, le=1e15)] | None = None
    per_layer_config: None = None


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check the values of a config.json on their own.

    Args:
        where: the file, for messages.
    Raises: UnreadableInput naming the first field with a wrong value; UnsupportedModel where the
        weights are quantised, or attention or experts are to run by a kernel of the hub.
    """
    if (quantization := config.get("quantization_config")) is not None:
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method", "unknown") if known else quantization
        raise UnsupportedModel(
            f"{where}: the weights are quantised (quant_method {printable(repr(method))}): give "
            "the checkpoint in bfloat16, float16 or float32, without quantization_config"
        )
    for name, choice in config.items():
        named = choice is not None and not (isinstance(choice, str) and choice.isidentifier())
        if named and _chooses_kernels(name):
            raise UnsupportedModel(
                f"{where} has {name} {printable(repr(choice))}, which transformers would download "
                "and run: remove it"
            )
    _check_values(config, where)
    try:
        fields = _Known.model_validate(config)
    except ValidationError as error:
        raise _refusal(error, where) from None
    token, vocabulary = fields.pad_token_id, fields.vocab_size
    if token is not None and vocabulary is not None and token >= vocabulary:
        raise UnreadableInput(
            f"{where}: pad_token_id {token} is outside of the vocabulary of {vocabulary}: give a "
            "token that is in it, or null"
        )
    heads, groups = fields.num_attention_heads, fields.num_key_value_heads
    if heads is not None and groups is not None and heads % groups:
        raise UnreadableInput(
            f"{where}: num_key_value_heads {groups} does not divide num_attention_heads {heads}"
        )


def check_counts(config: Mapping[str, Any], tensors: Iterable[str], where: str) -> None:
    """Check that config.json has no more layers than there are tensors for.

    Args:
        tensors: the names of all of the checkpoint's tensors.
    Raises: UnreadableInput.
    """
    layers = {found[1] for name in tensors if (found := _LAYER.search(name))}
    promised = config.get("num_hidden_layers")
    if isinstance(promised, int) and layers and promised > len(layers):
        raise UnreadableInput(
            f"{where}: num_hidden_layers is {promised}, but there are tensors of {len(layers)} "
            "layers: config and weights do not belong together, or the download is incomplete"
        )


def without_switches(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without what does not describe the weights: how to run them, labels of classes.

    A choice of kernels is left out of every part of the model, as transformers would fetch them.
    """
    return {
        key: without_switches(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in SWITCHES and not _chooses_kernels(key)
    }


def _chooses_kernels(name: str) -> bool:
    return name.strip("_").removesuffix("_internal") in _KERNEL_CHOICES


def _check_values(config: Mapping[str, Any], where: str) -> None:
    """No numbers beyond reason, and no nesting that transformers could not copy."""
    level: list[tuple[str, Any]] = list(config.items())
    for _ in range(MOST_DEPTH):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            # JSON of other tools may say NaN; of the numbers, only a bool may be compared by `is`
            if isinstance(value, float) and not math.isfinite(value):
                raise UnreadableInput(f"{where}: {printable(name)} is {value}: give a number")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise UnreadableInput(
                    f"{where}: {printable(name)} is {printable(value)}, which is no sensible number"
                )
            if isinstance(value, dict):
                below += [(f"{name}.{key}", part) for key, part in value.items()]
            elif isinstance(value, list):
                below += [(name, part) for part in value]
        if not below:
            return
        level = below
    raise UnreadableInput(f"{where}: {printable(level[0][0])} is nested too deeply")


def _refusal(error: ValidationError, where: str) -> UnreadableInput:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"][:1]))
    value = printable(repr(first["input"]))
    return UnreadableInput(f"{where}: {field}: {single_line(first['msg'])} (it has {value})")
