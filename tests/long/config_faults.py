"""Wrong values in config.json, in the tokenizer's files and in generation_config.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.long.case import ESCAPES, RAW, WRONG, Case, Damage, set_json

# beside the fields that the good one has
MORE_FIELDS = (
    *("rope_scaling", "rope_theta", "torch_dtype", "quantization_config", "num_labels", "id2label"),
    *("label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
    *("_attn_implementation", "attn_implementation", "experts_implementation", "auto_map"),
    *("num_experts", "per_layer_config", "transformers_weights", "tie_word_embeddings"),
    *("gradient_checkpointing", "is_encoder_decoder", "_name_or_path", "mlp_bias", "clip_qkv"),
    *("to_dict", "get_text_config", "attribute_map", "base_model_tp_plan", "is_heterogeneous"),
    *("mlp_layer_types", "use_cache", "hysparse", "base_model_type", "n_layer", "is_decoder"),
)
VALUES: dict[str, list[Any]] = {
    "model_type": ["qwen3\n", "QWEN3", "llama", "qwen3_moe", "gpt2", "../qwen3", "кит", ESCAPES],
    "_attn_implementation": ["flash_attention_2", "kernels-community/flash-attn", "eager", "sdpa"],
    "attn_implementation": [
        "kernels-community/flash-attn:f",
        "flash_attention_3",
        "flex_attention",
    ],
    "experts_implementation": ["kernels-community/megablocks", "grouped_mm", "none"],
    "rope_parameters": [
        {"rope_type": kind, "rope_theta": 1e4, **more}
        for kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "x", 3, None)
        for more in (
            *({}, {"factor": 0}, {"factor": -1}, {"factor": "x"}, {"factor": 1e308}),
            {"factor": 2.0, "short_factor": [1.0] * 3, "long_factor": [1.0] * 100_000},
            {"factor": 2.0, "partial_rotary_factor": 1e9},
            {"factor": 2.0, "partial_rotary_factor": 0.5},
            {"factor": 4.0, "low_freq_factor": 0, "high_freq_factor": 0},
            {"factor": 4.0, "original_max_position_embeddings": 0},
            {"factor": 4.0, "original_max_position_embeddings": 10**12},
        )
    ]
    + [{"rope_theta": x} for x in (0, -1, "x", 1e300, None, [1e4])]
    + [{"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}],
    "rope_scaling": [{"type": "linear", "factor": f} for f in (0, 1, 2.0, "x", None)]
    + [{"type": "mrope", "mrope_section": [1, 2]}, {"type": ["yarn"]}, {"rope_type": {}}],
    "layer_types": [
        ["full_attention"] * 3,
        ["full_attention"] * 5,
        ["sliding_attention"] * 4,
        ["x"] * 4,
        ["linear_attention"] * 4,
        ["full_attention", None, 1, {}],
    ],
    "hidden_act": ["silu2", "gelu", "__class__", "silu\n"],
    "architectures": [["Qwen3ForSequenceClassification"], "Qwen3ForCausalLM", ["x" * 9999], [None]],
    "dtype": ["float8_e4m3fn", "int8", "float16", "float64", "nn", "torch.float32", "auto"],
    "pad_token_id": [63, 64, 10**6],
    "eos_token_id": [64, [1, 2, 10**6], [], [[1]]],
    "num_labels": [10_000_000],
    "id2label": [{"x": "y"}, {str(i): "y" for i in range(100_000)}],
    "problem_type": ["regression", "single_label_classification"],
    "tie_word_embeddings": [False],
    "quantization_config": [{"quant_method": "fp8"}, {"load_in_4bit": True}],
    "initializer_range": [1e6],
    "head_dim": [7, 8, 16],
    "num_key_value_heads": [2, 4],
    "rms_norm_eps": [0, 1, 1e-30],
    "sliding_window": [1, 2, 4096],
    "max_position_embeddings": [1, 2**31 - 1, 2**31, 10**12],
}


def set_config(**values: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def raw_config(field: str, raw: str) -> Damage:
    """Put JSON that Python's writer would not write."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | {field: "HERE"}
        path.write_text(json.dumps(content).replace('"HERE"', raw))

    return change


def config_cases(config: dict[str, Any]) -> Iterator[Case]:
    for field in dict.fromkeys((*config, *MORE_FIELDS)):
        for name, value in WRONG.items():
            yield Case("config", f"{field} {name}", set_config(**{field: value}))
        for i, value in enumerate(VALUES.get(field, ())):
            yield Case("config", f"{field} value {i}", set_config(**{field: value}))
        for name, raw in RAW.items():
            yield Case("config", f"{field} {name}", raw_config(field, raw))
        if field in config:
            yield Case("config", f"{field} absent", lambda f, k=field: _without(f, k))


def _without(folder: Path, field: str) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))


def tokenizer_cases(config: dict[str, Any], tokenizer: dict[str, Any]) -> Iterator[Case]:
    values = {k: v for k, v in WRONG.items() if k not in ("long list", "1e308", "3", "false")}
    more = (
        "chat_template",
        "auto_map",
        "added_tokens_decoder",
        "extra_special_tokens",
        "padding_side",
    )
    for field in dict.fromkeys((*config, *more)):
        for name, value in values.items():
            damage = set_json("tokenizer_config.json", **{field: value})
            yield Case("tokenizer_config", f"{field} {name}", damage)
    for name in ("NoSuchTokenizer", "LlamaTokenizer", "Qwen2TokenizerFast", "builtins.print", "os"):
        damage = set_json("tokenizer_config.json", tokenizer_class=name)
        yield Case("tokenizer_config", f"tokenizer_class {name}", damage)
    code = {"AutoTokenizer": ["own.Tokenizer", None]}
    yield Case("tokenizer_config", "own code", set_json("tokenizer_config.json", auto_map=code))
    some = ("null", "true", "-1", "1e9", "text", "list", "object", "object of objects")
    for field in tokenizer:
        for name in some:
            damage = set_json("tokenizer.json", **{field: WRONG[name]})
            yield Case("tokenizer", f"{field} {name}", damage)
    for name in some:
        for field in ("type", "vocab", "unk_token", "merges"):
            model = tokenizer["model"] | {field: WRONG[name]}
            yield Case(
                "tokenizer", f"model.{field} {name}", set_json("tokenizer.json", model=model)
            )
    vocab = {f"w{i}": i for i in range(300)}
    larger = tokenizer["model"] | {"vocab": tokenizer["model"]["vocab"] | vocab}
    yield Case("tokenizer", "more tokens than embeddings", set_json("tokenizer.json", model=larger))
    holes = tokenizer["model"] | {"vocab": {"<unk>": 2, "a": 10**9, "b": -1}}
    yield Case("tokenizer", "absurd ids", set_json("tokenizer.json", model=holes))
    yield Case("tokenizer", "none at all", lambda f: [p.unlink() for p in f.glob("*tok*.json")])


def generation_cases() -> Iterator[Case]:
    fields = ("max_length", "eos_token_id", "pad_token_id", "temperature", "do_sample", "num_beams")
    more = ("cache_implementation", "transformers_version", "max_new_tokens", "compile_config")
    values = ("null", "true", "-1", "1e9", "NaN", "text", "list", "object of objects", "long text")
    for field in (*fields, *more, "stop_strings", "watermarking_config", "to_dict"):
        for name in values:
            damage = set_json("generation_config.json", **{field: WRONG[name]})
            yield Case("generation_config", f"{field} {name}", damage)
