"""A small random configuration for each supported family; every row of FAMILIES needs one."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hysparse_cli.model.config import HysparseSpec, converted_config
from hysparse_cli.model.registration import HySparseConfig

VOCAB_SIZE = 97

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

TINY: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {"logit_scale": 0.5},
    "dots1": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1},
    "ernie4_5": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 64},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1},
    "gpt_neox": {"num_key_value_heads": 4, "attention_bias": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.3},
    "helium": {},
    "hunyuan_v1_dense": {},
    "llama": {},
    "ministral": {"sliding_window": 64},
    "mistral": {"sliding_window": 64},
    "mixtral": {"num_local_experts": 4},
    "olmo": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "seed_oss": {"residual_dropout": 0.0},
    "starcoder2": {},
}


# One of each kind, for slow tests of what the other families share with these: norms of queries and
# keys (qwen3), a softcap and a norm after attention (gemma2), sinks (gpt_oss), fused projections
# (phi3, gpt_neox), no norm before attention (olmo2), experts (mixtral), a parallel MLP (cohere).
KINDS = (
    "llama",
    "qwen3",
    "gemma2",
    "gpt_oss",
    "phi3",
    "gpt_neox",
    "olmo2",
    "mixtral",
    "cohere",
)


def dense_config(family: str, **changes: Any) -> Any:
    fields = COMMON | TINY[family] | changes
    # the grouped matrix product of fused experts takes no float64
    return AutoConfig.for_model(family, **fields, experts_implementation="eager")


def dense_model(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(dense_config(family), **options).double().eval()


def hysparse_model(
    family: str, spec: HysparseSpec, dtype: torch.dtype = torch.float64, **changes: Any
) -> Any:
    """A HySparse model with random weights, gates and sinks of its own."""
    torch.manual_seed(0)
    dense = dense_config(family, **changes).to_dict()
    config = HySparseConfig.from_dict(converted_config(dense, spec), experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if ".hysparse." in name:
            torch.nn.init.normal_(parameter)
    return model
