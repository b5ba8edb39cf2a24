"""hysparse bench: what each phase measures, which is the model's own work and nothing else."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from hysparse_cli.bench.attention import AttentionPart
from hysparse_cli.bench.break_even import break_even
from hysparse_cli.bench.decode import Decoding, decode, static_kv_cache
from hysparse_cli.bench.lists import local_lists
from hysparse_cli.bench.prefill import measure_prefill, prefill
from hysparse_cli.bench.rows import Row, times_dense
from hysparse_cli.bench.timing import Marks, Timing, timed
from hysparse_cli.bench.train import _switch_checkpointing, measure_train
from hysparse_cli.bench.work import ModelSizes, Work, work_of
from hysparse_cli.model.attention import LayerCall
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.kv_cache import held_kv_bytes
from hysparse_cli.model.loading import load
from tests.model.tiny import dense_config, dense_model, hysparse_model
from tests.observed import observed

SPEC = HysparseSpec("FSSFS", block_size=4, top_k_tokens=8, window_tokens=6)


def test_a_dense_cache_holds_what_arithmetic_says(tiny_original: Path) -> None:
    model = load(str(tiny_original)).model
    start = prefill(model, torch.arange(3, 43).view(2, 20))
    kv_heads, head_dim, layers, itemsize = 2, 8, 4, 4
    assert held_kv_bytes(start.cache) == 2 * 2 * 20 * kv_heads * head_dim * layers * itemsize


def test_bytes_of_a_view_are_those_it_keeps_alive(tiny_original: Path) -> None:
    cache = prefill(load(str(tiny_original)).model, torch.arange(3, 43).view(2, 20)).cache
    whole = held_kv_bytes(cache)
    for layer in cache.layers:
        layer.keys = layer.keys[:, :, -3:]
    assert held_kv_bytes(cache) == whole


def test_timing() -> None:
    result, milliseconds = timed(lambda: "done", torch.device("cpu"))
    assert result == "done" and milliseconds >= 0
    timing = Timing([3.0, 1.0, 2.0])
    numbers = timing.as_json("ttft")
    assert numbers["median_ttft_ms"] == 2.0 and numbers["max_ttft_ms"] == 3.0
    assert str(timing) == "2.00 ±50%"
    assert str(Timing([1234.5])) == "1,234"
    assert Timing([float(n) for n in range(1, 102)]).percentile(99) == 100.0
    assert Timing([4.0, 1.0, 2.0, 8.0]).percentile(50) == 3.0


@pytest.mark.parametrize("layout", ["dense", "hysparse", "hybrid-swa"])
@pytest.mark.parametrize("context", [5, 21])
@torch.inference_mode()
def test_a_step_of_decoding_is_the_models_own(layout: str, context: int) -> None:
    """Over the same random keys and values in transformers' dynamic cache, at the same position."""
    if layout == "dense":
        model = dense_model("qwen3")
    else:
        spec = HysparseSpec(SPEC.pattern, layout, 4, 8, 6)  # type: ignore[arg-type]
        model = hysparse_model("qwen3", spec)
    observed(model)
    decoding = Decoding(model, context, batch=2, seed=0)
    before = DynamicCache(config=model.config)
    for layer, held in enumerate(decoding.cache.layers):
        first = max(0, held.max_cache_len - context)  # a full window's oldest key is about to go
        past = [x[:, :, first : first + context - 1].clone() for x in (held.keys, held.values)]
        before.update(*past, layer)
        if hasattr(before.layers[layer], "cumulative_length"):
            before.layers[layer].cumulative_length = context - 1
    prompt = decoding.ids.clone()
    decoding.step()
    positions = torch.full_like(prompt, context - 1)
    output = model(input_ids=prompt, past_key_values=before, position_ids=positions)
    assert decoding.ids.equal(output.logits[:, -1:].argmax(-1))
    decoding.rewind()
    assert decoding.cache.get_seq_length() == context - 1


@pytest.mark.parametrize("context", [4, 40])
def test_a_static_cache_holds_what_arithmetic_says(context: int) -> None:
    model = hysparse_model("qwen3", SPEC, torch.float32)
    part = observed(model)
    found = decode(model, part, context, 2, steps=1, seed=0)
    assert found["kv_bytes"] == 2 * static_kv_cache(model.config).total_bytes(context, 4)


def test_dense_attention_is_the_models_own_and_says_what_it_can_not_do() -> None:
    model, ids = dense_model("qwen3"), torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        observed(model)
        assert torch.allclose(model(ids).logits, expected, atol=1e-12)
    q, k = torch.rand(1, 3, 4, 8), torch.rand(1, 3, 2, 8)
    call = LayerCall(0, q, k, k, 1.0, sinks=torch.zeros(4), window_tokens=2)
    with pytest.raises(ValueError, match="no s_aux and no sliding_window"):
        AttentionPart("sdpa").attend(call)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", ["dense", "hysparse"])
def test_observing_changes_no_gradient_and_sees_every_call(
    layout: str, checkpointing: bool
) -> None:
    model = dense_model("qwen3") if layout == "dense" else hysparse_model("qwen3", SPEC)
    part, ids = observed(model), torch.arange(3, 43).view(2, 20)
    model.train()
    if checkpointing:
        _switch_checkpointing(model, "enable", {"use_reentrant": False})

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    part.marks = Marks(ids.device)
    heard = gradients()
    passes = 3 if checkpointing else 2  # forward, once more, and backward
    assert len(part.marks.spans_ms()) == passes * 5
    assert len(plain) == len(heard) and all(map(torch.equal, plain, heard))


@pytest.mark.parametrize("layout", ["dense", "hysparse"])
def test_attention_is_a_part_of_the_whole(layout: str) -> None:
    model = dense_model("qwen3") if layout == "dense" else hysparse_model("qwen3", SPEC)
    part = observed(model)
    start = measure_prefill(model, part, 24, 2, seed=0)
    step = measure_train(model, part, 24, 2, seed=0, checkpointing=True)
    assert 0 < start["attentions_ms"][0] < start["ttfts_ms"][0]
    assert 0 < step["attentions_ms"][0] < step["steps_ms"][0]
    assert part.marks is None and all(p.grad is None for p in model.parameters())
    assert not model.training
    found = decode(model, part, 24, 2, steps=3, seed=0)
    assert len(found["tpots_ms"]) == len(found["attentions_ms"]) == 3
    assert min(found["attentions_ms"]) < max(found["tpots_ms"])


def test_matrix_work_is_what_torch_counts() -> None:
    config = dense_config("qwen3", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 24, dtype=torch.long), logits_to_keep=1)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    sizes = ModelSizes(model)
    assert sizes.linear(48, 2).flops == counts["aten.mm"]  # the rotary's outer product is a bmm
    whole, attention = work_of(sizes, "prefill", 24, 2)
    assert whole.flops - attention.flops == sizes.linear(48, 2).flops
    assert sizes.weight_bytes == sum(p.nbytes for p in model.parameters())


def test_attention_work_counts_the_pairs_that_a_sparse_layer_computes() -> None:
    sizes = ModelSizes(hysparse_model("qwen3", SPEC))
    context, batch, heads, head_dim = 20, 3, 4, 8
    pairs = sum(2 * (t + 1) + 3 * (min(t + 1, 8) + min(t + 1, 6)) for t in range(context))
    attention = sizes.prefill_attention(context, batch)
    assert attention.flops == 4 * batch * heads * head_dim * pairs
    keys = 2 * context + 3 * (8 + 6)
    assert sizes.decode_attention(context, batch).moved == 2 * batch * keys * 2 * head_dim * 8


def test_the_floor_is_the_longer_of_both() -> None:
    assert Work(flops=100, moved=30).floor_ms(10.0, 10.0) == 10_000
    assert Work(flops=10, moved=30).floor_ms(10.0, 10.0) == 3_000


def test_ratios_are_to_the_best_dense_subject_of_the_same_cell() -> None:
    def row(subject: str, context: int, ms: float, batch: int) -> Row:
        values = {"kv_bytes": 100 * batch, "largest_batch": batch}
        return Row(subject, "decode", context, 1, {"tpots_ms": [ms]}, values)

    ours = row("hysparse", 8, 2.0, 8)
    others = [row("dense-flash", 8, 9.0, 2), row("dense-cudnn", 8, 6.0, 4)]
    rows = [*others, ours, row("dense", 9, 1.0, 1)]
    assert times_dense(ours, rows) == {"time": 3.0, "kv_bytes": 0.25, "largest_batch": 2.0}
    assert times_dense(ours, [ours]) == {}


def test_the_break_even_is_between_the_contexts_around_it() -> None:
    assert break_even({1024: 0.5, 4096: 2.0}) == pytest.approx(2048)
    assert break_even({512: 2.0, 1024: 0.5, 4096: 2.0, 8192: 4.0}) == pytest.approx(2048)
    assert break_even({4096: 0.5}) is None and break_even({4096: 1.5}) == 0


def test_given_lists_are_what_sparse_layers_read() -> None:
    model = hysparse_model("qwen3", SPEC)
    part, ids = observed(model), torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        own = model(ids).logits
        part.calls, part.lists = [], local_lists(20, 2, 2, 4, torch.Generator().manual_seed(0))
        given = model(ids).logits
        state = part.calls[-1].state
        assert state is not None
        assert state.shared_by(3).block_idx.equal(part.lists.expand(2, -1, -1, -1))
        part.lists = None
        assert not given.equal(own) and model(ids).logits.equal(own)
