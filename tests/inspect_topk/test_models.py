"""inspect-topk on real and tiny models against what transformers' own attention maps say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hysparse_cli.inspect_topk import inspect_topk
from hysparse_cli.inspect_topk.look import look
from hysparse_cli.inspect_topk.reading import Reading
from hysparse_cli.inspect_topk.subject import Subject, load_subject
from hysparse_cli.model.attention import Branches
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.recipe import ConvertOptions, InspectOptions
from hysparse_cli.selection.overlap import QUERIES_PER_ROW, measure_overlap
from hysparse_kernels import block_sparse_attention
from tests.conftest import Hysparse

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside. " * 9
SMALL = {"block_size": 8, "top_k_tokens": 32, "window_tokens": 16}


def eager_maps(folder: Path, ids: list[int]) -> Tensor:
    """(L, H, T, T) float64, the attention maps of the stock model."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_attentions=True)
    return torch.cat(output.attentions)


def blocks_by_score(maps: Tensor, groups: int, size: int, kept: int) -> list[list[list[set[int]]]]:
    """[layer][query][KV head] the blocks of the largest probability, from whole maps."""
    layers, heads, length, _ = maps.shape
    blocks = maps.new_zeros(layers, heads, length, -(-length // size) * size)
    blocks[..., :length] = maps
    scores = blocks.view(layers, groups, heads // groups, length, -1, size).amax((2, -1))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :kept].tolist()
    return [
        [[set(best[a][g][t]) for g in range(groups)] for t in range(length)] for a in range(layers)
    ]


def test_a_dense_models_fit_and_overlap_equal_whole_attention_maps(stories_260k: Path) -> None:
    options = InspectOptions(prompt=STORY, max_tokens=150, device="cpu")
    found = inspect_topk(str(stories_260k), options, ConvertOptions(pattern="FSFSF", **SMALL))
    assert (found.kind, found.tokens, found.spec.pattern) == ("dense", 150, "FSFSF")
    ids = AutoTokenizer.from_pretrained(stories_260k)(STORY)["input_ids"][:150]
    maps = eager_maps(stories_260k, ids)
    groups, heads = 4, 8
    chosen = blocks_by_score(maps, groups, 8, 4)
    block_mass = torch.stack([maps[..., n : n + 8].sum(-1) for n in range(0, 150, 8)], -1)
    queries = range(32, 150)

    def mass(b: int, a: int) -> float:
        """Of layer b on the blocks that a selects, mean over heads and queries that choose."""
        total = 0.0
        for t in queries:
            for head in range(heads):
                of_head = block_mass[b, head, t]
                total += sum(float(of_head[n]) for n in chosen[a][t][head // 2])
        return total / heads / len(queries)

    for layer in found.served_layers:
        b, a = layer.layer, layer.server
        fit = layer.fit
        assert fit is not None and fit.queries == len(queries)
        recall = [
            len(chosen[b][t][g] & chosen[a][t][g]) / 4 for t in queries for g in range(groups)
        ]
        assert fit.recall == pytest.approx(sum(recall) / len(recall), abs=2e-3)
        assert fit.mass_selected == pytest.approx(mass(b, a), abs=1e-3)
        assert fit.mass_own_best == pytest.approx(mass(b, b), abs=1e-3)
        assert fit.mass_own_best > fit.mass_selected > fit.mass_random
    assert found.overlap is not None
    for a in range(5):
        for b in range(5):
            expected = mass(b, a) / mass(b, b) if b >= a else 0.0
            assert found.overlap[a][b] == pytest.approx(expected, abs=2e-3)
    lists = found.selections[2].tolist()
    same = sum(set(lists[t][g]) == chosen[2][t][g] for t in queries for g in range(groups))
    assert same / len(queries) / groups > 0.98  # float32 may swap near ties


def test_overlap_is_what_dp_goes_by(tiny_original: Path) -> None:
    sizes = {"block_size": 8, "top_k_tokens": 16, "window_tokens": 8}
    planned = ConvertOptions(pattern="FSSF", **sizes)
    tokens = 16 + QUERIES_PER_ROW  # where it looks at all queries that choose
    prompt = " ".join(f"w{11 * i % 61}" for i in range(tokens))
    options = InspectOptions(prompt=prompt, max_tokens=tokens, device="cpu")
    subject = load_subject(str(tiny_original), options, planned, (), lambda *at: None)
    ids = subject.tokenizer(prompt)["input_ids"]
    spec = HysparseSpec("FFFF", **sizes)
    fitted = measure_overlap(subject.model, torch.tensor([ids]), spec, 0, lambda *at: None)
    found = inspect_topk(str(tiny_original), options, planned)
    assert found.overlap is not None
    for a in range(4):
        for b in range(a + 1, 4):
            expected = fitted.overlap.similarity[a][b]
            assert found.overlap[a][b] == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def gated(tiny_converted: Path) -> Subject:
    """The converted tiny model with gates and sinks that say something."""
    options = InspectOptions(device="cpu")
    subject = load_subject(str(tiny_converted), options, ConvertOptions(), (), lambda *at: None)
    torch.manual_seed(1)
    for module in subject.model.modules():
        if isinstance(module, Branches):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=1.5)
    return subject


def test_gates_and_sinks_are_what_the_branches_do(gated: Subject) -> None:
    ids = torch.arange(3, 63).tolist()
    observed: dict[int, dict[str, Any]] = {}
    with torch.no_grad():
        gated.model(
            torch.tensor([ids]),
            hysparse_observer=lambda **seen: observed.update({seen["layer"]: seen}),
        )
    seen, _ = look(gated, Reading(ids, "", None, []), lambda *at: None)
    assert list(seen.branches) == [1, 2]
    for layer, branches in seen.branches.items():
        here = observed[layer]
        gates = here["gates"].mean((0, 1, 2)).tolist()
        assert [branches.gate_sparse, branches.gate_window] == pytest.approx(gates)
        module = gated.model.get_submodule(f"model.layers.{layer}.self_attn.hysparse")
        sinks = module.sinks.detach()
        ones = torch.ones_like(here["v"])  # what a branch gives is then what its sink leaves
        common = {"block_size": 8, "scale": here["scale"]}
        k = observed[0]["k"]
        sparse = block_sparse_attention(
            here["q"], k, ones, here["block_idx"], sinks=sinks[:, 0], **common
        )
        assert branches.sink_sparse == pytest.approx(1 - float(sparse.out.mean()), abs=1e-5)
        window = torch.arange(60)[:, None] // 1
        logits = torch.einsum("thd,shd->hts", here["q"][0], here["k"][0].repeat_interleave(2, 1))
        keys = torch.arange(60)
        hidden = (keys > window) | (keys <= window - 8)
        logits = (logits * here["scale"]).masked_fill(hidden, -torch.inf)
        taken = torch.sigmoid(sinks[:, 1, None] - logits.logsumexp(-1)).mean()
        assert branches.sink_window == pytest.approx(float(taken), abs=1e-5)


def test_a_converted_model_is_looked_at_as_it_runs(gated: Subject) -> None:
    ids = torch.arange(3, 63).tolist()
    seen, hidden = look(gated, Reading(ids, "", None, [40, 50]), lambda *at: None)
    observed: dict[int, Tensor] = {}

    def observer(**found: Any) -> None:
        if found["block_idx"] is not None:
            observed[found["layer"]] = found["block_idx"]

    with torch.no_grad():
        output = gated.model.model(torch.tensor([ids]), hysparse_observer=observer)
    assert torch.equal(hidden, output.last_hidden_state)
    assert torch.equal(seen.selections[0], observed[0][0])
    fit, answer_fit = seen.fits[1]
    assert fit is not None and answer_fit is not None
    assert (fit.queries, answer_fit.queries) == (44, 2)


def test_recipes_plan_for_dense_models_only(
    hysparse: Hysparse, tiny_original: Path, tiny_converted: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "convert: {pattern: FSFS, last_layer_full: false, block_size: 4, top_k_tokens: 8}\n"
        "inspect_topk: {max_tokens: 40}\n"
    )
    args = ("--recipe", recipe, "--prompt", "w1 w2 w3 " * 20, "--json")
    dense = json.loads(hysparse("inspect-topk", tiny_original, *args).stdout)
    assert (dense["hysparse"]["pattern"], dense["num_blocks"]) == ("FSFS", 10)
    converted = json.loads(hysparse("inspect-topk", tiny_converted, *args).stdout)
    assert (converted["hysparse"]["pattern"], converted["num_blocks"]) == ("FSSF", 5)


def test_swapped_attention_is_looked_at_where_it_would_be(
    hysparse: Hysparse, tiny_original: Path
) -> None:
    args = ("--prompt", "w1 w2 w3 w4 w5 " * 20, "--json", "--block-size", 8, "--top-k-tokens", 16)
    swap = ("--set", "convert.swap_attention=[[1, 3]]")
    found = [
        json.loads(hysparse("inspect-topk", tiny_original, *args, *more).stdout)
        for more in ((), swap)
    ]
    assert found[1]["hysparse"]["swapped"] == [[1, 3]]
    assert found[0]["overlap"] != found[1]["overlap"]


def test_a_strategy_that_measures_may_plan(hysparse: Hysparse, tiny_original: Path) -> None:
    sizes = ("--block-size", 8, "--top-k-tokens", 16, "--window-tokens", 8)
    text = ("--set", "convert.calibration_tokens=512", "--prompt", "w1 w2 " * 20)
    text += ("--set", "convert.calibration_sequence_tokens=256")
    run = hysparse("inspect-topk", tiny_original, "--strategy", "dp", *sizes, *text, "--json")
    assert run.exit_code == 0, run.stderr
    pattern = json.loads(run.stdout)["hysparse"]["pattern"]
    assert len(pattern) == 4 and pattern[0] == pattern[3] == "F"
    assert list(tiny_original.parent.glob("*scores*")) == []
