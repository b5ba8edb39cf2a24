"""What travels along a forward: refusals, autocast, observers, and gradients that stay right."""

from typing import Any

import pytest
import torch

from hysparse_cli.model.attention import LayerCall, hysparse_attention
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.state import ForwardOptions, forward_state
from tests.model.equivalences import SPEC, ids
from tests.model.tiny import dense_model, hysparse_model


def test_reentrant_checkpointing_is_refused() -> None:
    model, x = hysparse_model("llama", SPEC).train(), ids()
    model._set_gradient_checkpointing(
        True, lambda f, *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=True)
    )
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(x, labels=x, use_cache=False)


def test_two_forwards_before_one_backward_keep_their_own_state() -> None:
    model = hysparse_model("llama", SPEC).train()
    a, b = ids(1), ids(2)

    def gradient(*batches: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        sum(model(x, labels=x, use_cache=False).loss for x in batches).backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    torch.testing.assert_close(gradient(a, b), gradient(a) + gradient(b), rtol=0, atol=1e-12)


def test_the_loss_is_the_same_with_and_without_a_cache_in_training() -> None:
    model, x = hysparse_model("qwen3", SPEC).train(), ids()
    with_cache = model(x, labels=x, use_cache=True).loss
    assert torch.allclose(with_cache, model(x, labels=x, use_cache=False).loss, rtol=0, atol=1e-12)


def test_the_served_layers_send_gradients_into_the_shared_keys_and_values() -> None:
    model, x = hysparse_model("llama", SPEC).train(), ids()
    model(x, labels=x, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_user_given_attention_implementation_is_refused() -> None:
    model = hysparse_model("llama", SPEC)
    with pytest.raises(ValueError, match="'sdpa' can't run HySparse layers"):
        model.set_attn_implementation("sdpa")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="'sdpa' can't run HySparse layers"):
        type(model)(model.config)


def test_layout_full_takes_any_attention_implementation() -> None:
    model, x = hysparse_model("llama", HysparseSpec("FFFFF", layout="full")), ids()
    model.set_attn_implementation("eager")
    assert model(x, output_attentions=True).attentions[0].shape == (2, 4, 40, 40)


def test_attention_dropout_is_refused() -> None:
    model, x = hysparse_model("llama", SPEC).train(), ids()
    model.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        model(x)


def test_a_4d_mask_is_refused() -> None:
    model, x = hysparse_model("llama", SPEC), ids()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 40, 40\)"):
        model(x, attention_mask=torch.zeros(2, 1, 40, 40))


def test_a_mask_that_leaves_out_the_cached_tokens_is_refused() -> None:
    model, x = hysparse_model("llama", SPEC), ids()
    past = model(x[:, :30], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="covers 10 tokens, but there are 30 cached and 10 new"):
        model(x[:, 30:], attention_mask=torch.ones(2, 10), past_key_values=past)


def test_a_cache_under_gradient_checkpointing_is_refused() -> None:
    model, x = hysparse_model("llama", SPEC).train(), ids()
    past = model(x[:, :30], use_cache=True).past_key_values
    model._set_gradient_checkpointing(
        True, lambda f, *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
    )
    with pytest.raises(ValueError, match="layer 0 sees 10 keys where 40 are cached"):
        model(x[:, 30:], past_key_values=past)


@torch.no_grad()
def test_right_padding_changes_no_real_token() -> None:
    model, x = hysparse_model("llama", SPEC), ids()
    mask = torch.ones_like(x)
    mask[0, 30:] = 0
    logits = model(x, attention_mask=mask).logits
    assert torch.allclose(logits[0, :30], model(x[:1, :30]).logits[0], rtol=0, atol=1e-12)
    assert torch.allclose(logits[1], model(x[1:]).logits[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_autocast_leaves_the_attention_ops_in_full_precision() -> None:
    model = hysparse_model("llama", SPEC, torch.float32)
    module = model.model.layers[SPEC.layers.full_layers[-1]].self_attn
    q, k, v = torch.randn(3, 2, 4, 40, 8).unbind()
    outputs = []
    for enabled in (False, True):
        state = forward_state(SPEC, ids(), None, None, None)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output, _ = hysparse_attention(module, q, k, v, None, scaling=0.3, hysparse=state)
        outputs.append(output)
    assert outputs[0].equal(outputs[1])


@torch.no_grad()
def test_an_observer_sees_every_layer_once() -> None:
    model, x = hysparse_model("qwen3", SPEC), ids()
    selected: list[Any] = []
    gates: list[Any] = []
    layers: list[int] = []

    def note(call: LayerCall) -> torch.Tensor:
        out = call.attend()
        layers.append(call.layer)
        selected.append(call.block_idx)
        gates.append(call.gates)
        return out

    plain = model(x, use_cache=False).logits
    assert plain.equal(model(x, use_cache=False, hysparse=ForwardOptions(observer=note)).logits)
    assert layers == [0, 1, 2, 3, 4]
    assert selected[1] is selected[0] and selected[2] is selected[0] and selected[4] is selected[3]
    assert selected[0].shape == (2, 40, 2, SPEC.top_k_blocks)
    assert [found is None for found in gates] == [True, False, False, True, False]
    assert gates[1].shape == (2, 40, 4, 2)


@torch.no_grad()
def test_what_an_observer_returns_is_the_layers_output() -> None:
    model, x = hysparse_model("qwen3", SPEC), ids()
    zero = ForwardOptions(observer=lambda call: torch.zeros_like(call.q))
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    seen: list[torch.Tensor] = []
    model(x, use_cache=False, hysparse=zero)
    assert len(seen) == 5 and not any(out.any() for out in seen)


@torch.no_grad()
def test_hidden_states_are_returned() -> None:
    model, x = hysparse_model("qwen3", SPEC), ids()
    assert len(model(x, output_hidden_states=True).hidden_states) == 6


@torch.no_grad()
def test_hybrid_swa_has_neither_selection_nor_gates() -> None:
    spec = HysparseSpec("FSSFS", layout="hybrid-swa", window_tokens=64)
    model, x = hysparse_model("llama", spec), ids()
    assert not any("gate" in name for name, _ in model.named_parameters() if "hysparse" in name)
    for parameter in (p for n, p in model.named_parameters() if n.endswith("hysparse.sinks")):
        parameter.fill_(-1e9)
    dense = dense_model("llama")
    model.load_state_dict(dense.state_dict(), strict=False)
    difference = (model(x).logits - dense(x).logits).abs().max()
    assert difference < 1e-12, "a window over the whole context is dense attention"
