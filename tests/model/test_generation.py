"""model.generate() and the cache it builds, for every family and every way to decode."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hysparse_cli.model.config import HysparseSpec
from tests.model.equivalences import SPEC, ids
from tests.model.tiny import TINY, hysparse_model

GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


def generated(model: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    options = GREEDY | options
    tokens: torch.Tensor = model.generate(x, attention_mask=torch.ones_like(x), **options)
    return tokens


@pytest.mark.parametrize("family", TINY)
def test_greedy_and_beam_are_the_same_with_and_without_a_cache(family: str) -> None:
    model, x = hysparse_model(family, SPEC), ids(tokens=17)
    assert generated(model, x).equal(generated(model, x, use_cache=False))
    beam = {"num_beams": 3, "num_return_sequences": 2}
    assert generated(model, x, **beam).equal(generated(model, x, use_cache=False, **beam))


@pytest.mark.parametrize("family", TINY)
def test_a_saved_model_loads_and_computes_the_same(family: str, tmp_path: Path) -> None:
    model, x = hysparse_model(family, SPEC, torch.float32), ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert loaded(x).logits.equal(model(x).logits)


@pytest.mark.parametrize("tokens", [3, 17])
def test_a_static_cache_generates_the_same(tokens: int) -> None:
    model, x = hysparse_model("qwen3", SPEC), ids(tokens=tokens)
    static = generated(model, x, cache_implementation="static", disable_compile=True)
    assert static.equal(generated(model, x, use_cache=False))


def test_left_padded_rows_generate_what_each_row_generates_alone() -> None:
    model, x = hysparse_model("llama", SPEC), ids(tokens=17)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
        together = model.generate(x, attention_mask=mask, **GREEDY, **cache)
        assert together[0, 17:].equal(generated(model, x[:1, 5:])[0, 12:])
        assert together[1].equal(generated(model, x[1:])[0])


def test_sampling_draws_the_same_with_and_without_a_cache() -> None:
    model, x = hysparse_model("mistral", SPEC), ids(tokens=17)
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        draws.append(generated(model, x, do_sample=True, top_p=0.9, use_cache=use_cache))
    assert draws[0].equal(draws[1])


def test_assisted_decoding_gives_what_greedy_decoding_gives() -> None:
    model, x = hysparse_model("qwen3", SPEC), ids(batch=1, tokens=17)
    greedy = generated(model, x)
    assert generated(model, x, assistant_model=hysparse_model("llama", SPEC)).equal(greedy)
    assert generated(model, x, prompt_lookup_num_tokens=3).equal(greedy)


def test_chunked_prefill_by_generate() -> None:
    model, x = hysparse_model("qwen3", SPEC), ids(tokens=17)
    assert generated(model, x, prefill_chunk_size=5).equal(generated(model, x))


def test_a_cache_made_without_the_config_computes_the_same() -> None:
    model, x = hysparse_model("llama", SPEC), ids(tokens=17)
    assert generated(model, x, past_key_values=DynamicCache()).equal(generated(model, x))


def test_a_second_turn_after_a_padded_first_one() -> None:
    """Holes in the attention mask, as a batched conversation leaves them, are never attended."""
    model, x = hysparse_model("llama", SPEC), ids()
    mask = torch.ones_like(x)
    mask[0, 14:20] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(x, attention_mask=mask, position_ids=positions).logits[0, 20:]
        noise = x.clone()
        noise[0, 14:20] = 5
        same = model(noise, attention_mask=mask, position_ids=positions).logits[0, 20:]
    assert whole.equal(same)


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("decoded", [0, 3])
def test_kv_bytes_held_are_the_arithmetic_to_the_byte(tokens: int, decoded: int) -> None:
    spec = HysparseSpec("FSSFS", block_size=4, top_k_tokens=8, window_tokens=6)
    model, x = hysparse_model("qwen3", spec, torch.float32), ids(tokens=tokens + decoded)
    past = None
    with torch.no_grad():
        for begin, end in [(0, tokens), *((i, i + 1) for i in range(tokens, tokens + decoded))]:
            past = model(x[:, begin:end], past_key_values=past, use_cache=True).past_key_values
    total = tokens + decoded
    per_token = 2 * 2 * 2 * 8 * 4  # k and v, batch, KV heads, head dim, float32
    window = min(total, spec.window_tokens - 1)  # the next query brings its own key
    held = sum(
        tensor.untyped_storage().nbytes()
        for layer in past.layers
        for tensor in (layer.keys, layer.values)
    )
    assert held == per_token * (2 * total + 3 * window)
