"""Holds the configs of the paper's two models by name: no download is needed to plan."""

from typing import Any

LONGEST = 1 << 18  # tokens

# "paper-7b" is the paper's dense model: its layers, heads and hidden size; width of the MLP and
# vocabulary are ours, as the 7B models of that shape have them. "paper-80b-a3b" is the attention
# stack only of its mixture of experts: the MLP is as good as absent (16 wide) and the vocabulary
# small, so that "whole model" there is attention with its projections and norms.
PRESETS: dict[str, dict[str, Any]] = {
    "paper-7b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 11008,
        "vocab_size": 151680,
        "max_position_embeddings": LONGEST,
        "dtype": "bfloat16",
    },
    "paper-80b-a3b": {
        "model_type": "qwen3",
        "hidden_size": 2048,
        "num_hidden_layers": 49,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 16,
        "vocab_size": 1024,
        "max_position_embeddings": LONGEST,
        "dtype": "bfloat16",
    },
}
