"""In-memory patterns of one dense model are what converted checkpoints of those patterns are."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hysparse_cli.families import FAMILIES
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.logits import hidden_states
from hysparse_cli.model.observe import watch_attention
from hysparse_cli.placement.overlap import measure_overlap
from hysparse_cli.placement.variants import Variants
from tests.model import tiny

SIZES: dict[str, int] = {"block_size": 8, "top_k_tokens": 16, "window_tokens": 8}
ROWS = torch.randint(3, tiny.VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(0))


def variants_of(family: str, rows: torch.Tensor = ROWS) -> Variants:
    model: Any = tiny.dense_model(family).float()
    spec = HysparseSpec("FFFFF", **SIZES)
    fitted = measure_overlap(model, rows, spec, 0, lambda done, total: None)
    return Variants(model, rows, spec, fitted.gate_logits)


@pytest.mark.parametrize("family", tiny.KINDS)
def test_every_kind_of_family_is_measured_and_switched(family: str) -> None:
    variants = variants_of(family)
    few, all_full = variants.quality("FSSSF"), variants.quality("FFFFF")
    assert few.kl > 0 and few.loss > 0
    if "sliding_window" not in tiny.TINY[family] and family != "gemma2":
        assert abs(all_full.kl) < 1e-5
    assert variants.quality("FSSSF") == few  # nothing stays of the pattern before


def test_a_variant_is_the_model_of_its_pattern() -> None:
    variants = variants_of("qwen3")
    variants.quality("FSFSF")
    spec = HysparseSpec("FSFSF", **SIZES)
    model = tiny.hysparse_model("qwen3", spec, torch.float32)
    model.load_state_dict(variants.model.state_dict(), strict=False)
    with torch.no_grad():
        expected = hidden_states(model, ROWS)
        torch.testing.assert_close(hidden_states(variants.model, ROWS), expected)


def test_overlap_is_whole_where_everything_is_selected() -> None:
    model: Any = tiny.dense_model("llama").float()
    spec = HysparseSpec("FFFFF", block_size=8, top_k_tokens=64, window_tokens=8)
    overlap = measure_overlap(model, ROWS, spec, 0, lambda done, total: None).overlap
    for b in range(5):
        for a in range(b):
            assert overlap.similarity[a][b] == pytest.approx(1.0, abs=1e-5)
            assert overlap.mass[a][b] == pytest.approx(1.0, abs=1e-5)
            assert 0.0 <= overlap.damage[a][b] <= 1.0
    assert all(x > 0 for x in overlap.importance)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_importance_is_how_much_the_attention_module_turns_its_residual(family: str) -> None:
    model: Any = tiny.dense_model(family).float()
    spec = HysparseSpec("FFFFF", **SIZES)
    importance = measure_overlap(model, ROWS[:1], spec, 0, lambda *at: None).overlap.importance
    added: list[torch.Tensor] = []
    residual: list[torch.Tensor] = []
    for layer in range(5):
        path = FAMILIES[family].attention.format(layer=layer)
        place = FAMILIES[family].layer.format(layer=layer)
        model.get_submodule(place).register_forward_pre_hook(
            lambda module, args: residual.append(args[0])
        )
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output: added.append(output[0])
        )
    watch_attention(model, ROWS[:1], lambda layer, seen: None)
    first = 64 - 48  # where its queries begin: fewer than it looks at at most, so it takes all
    turns = [
        1 - torch.cosine_similarity(x[0, first:], (x + y)[0, first:], dim=-1).mean()
        for x, y in zip(residual, added, strict=True)
    ]
    assert importance == pytest.approx([float(turn) for turn in turns], rel=1e-3, abs=1e-6)


def test_the_output_projection_is_the_one_that_the_family_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], output="to_out.0"))
    model: Any = tiny.dense_model("llama").float()
    for layer in model.model.layers:
        layer.self_attn.to_out = nn.ModuleList([nn.Linear(32, 32, bias=False)])
        layer.self_attn.to_out[0].weight.data.zero_()
    spec = HysparseSpec("FFFFF", **SIZES)
    importance = measure_overlap(model, ROWS, spec, 0, lambda *at: None).overlap.importance
    assert importance == pytest.approx([0.0] * 5, abs=1e-6)


def test_a_layer_that_copies_its_server_takes_no_damage() -> None:
    """Layer 2 reads what layer 1 does, with the same projections: its keys are the server's."""
    model: Any = tiny.dense_model("llama").float()
    first, second = model.model.layers[1], model.model.layers[2]
    first.mlp.down_proj.weight.data.zero_()
    first.self_attn.o_proj.weight.data.zero_()  # layer 1 passes its input on as it is
    second.self_attn.load_state_dict(
        first.self_attn.state_dict() | {"o_proj.weight": second.self_attn.o_proj.weight}
    )
    spec = HysparseSpec("FFFFF", block_size=8, top_k_tokens=32, window_tokens=8)
    overlap = measure_overlap(model, ROWS, spec, 0, lambda done, total: None).overlap
    assert overlap.similarity[1][2] == pytest.approx(1.0, abs=1e-5)
    assert overlap.damage[1][2] < 0.6 * overlap.damage[0][2]
