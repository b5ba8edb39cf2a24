"""inspect-topk on real and tiny models against what transformers' own attention maps say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from hysparse_cli.inspect_topk import inspect_topk
from hysparse_cli.inspect_topk.observe import look
from hysparse_cli.inspect_topk.reading import Asked, Reading
from hysparse_cli.inspect_topk.selection import movements, selection_maps
from hysparse_cli.inspect_topk.subject import Subject, load_subject
from hysparse_cli.model.attention import LayerCall
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.state import ForwardOptions
from hysparse_cli.placement.overlap import QUERIES_PER_ROW, measure_overlap
from hysparse_cli.recipe import ConvertOptions, InspectOptions
from hysparse_kernels import block_sparse_attention, sliding_window_attention
from tests.conftest import Hysparse
from tests.model import tiny

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


def gated(family: str, **switches: Any) -> Subject:
    """A converted random model with gates and sinks that say something."""
    spec = HysparseSpec("FSSFS", block_size=8, top_k_tokens=16, window_tokens=8, **switches)
    return Subject(tiny.hysparse_model(family, spec), None, spec, None)


def observed(subject: Subject, ids: list[int]) -> tuple[Tensor, dict[int, dict[str, Any]]]:
    """What the head reads, and what the model's own observer is told of each layer."""
    seen: dict[int, dict[str, Any]] = {}

    def note(call: LayerCall) -> Tensor:
        out = call.attend()
        seen[call.layer] = vars(call) | {"block_idx": call.block_idx, "gates": call.gates}
        return out

    with torch.no_grad():
        options = ForwardOptions(observer=note)
        output = subject.model.model(torch.tensor([ids]), hysparse=options)
    return output.last_hidden_state, seen


IDS = torch.arange(3, 73).tolist()
GATED: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in ("qwen3", "gemma2", "gpt_oss")),
    *(("qwen3", switch) for switch in ({"sparse_kv": "own"}, {"window_kv": "shared"})),
    ("qwen3", {"window_kv": "none"}),
]


@pytest.mark.parametrize(("family", "switches"), GATED, ids=str)
def test_gates_sinks_and_reads_are_what_the_branches_do(
    family: str, switches: dict[str, Any]
) -> None:
    """Values that are one hot by block make each branch give what it gives to every block."""
    subject = gated(family, **switches)
    asked = Asked(needle=(20, 21), answer=(70, 70))
    seen, _ = look(subject, Reading(IDS, "", asked, []), lambda *at: None)
    _, layers = observed(subject, IDS)
    assert list(seen.branches) == [1, 2, 4]
    fit, _ = seen.fits[1]
    assert fit is not None and (fit.mass_sink > 1e-4) is (family == "gpt_oss")
    block = torch.arange(70) // 8
    for layer, branches in seen.branches.items():
        here, server = layers[layer], layers[0 if layer < 3 else 3]
        module = subject.model.get_submodule(f"model.layers.{layer}.self_attn.hysparse")
        sinks = module.sinks.detach()
        if here["sinks"] is not None:
            sinks = sinks + here["sinks"].detach()[:, None]
        options = {name: here[name] for name in ("scale", "softcap")}
        one_hot = torch.eye(9, dtype=torch.float64)[block][None, :, None].expand(1, 70, 2, 9)
        k = here["k"] if switches.get("sparse_kv") == "own" else server["k"]
        sparse = block_sparse_attention(
            here["q"], k, one_hot, here["block_idx"], block_size=8, sinks=sinks[:, 0], **options
        ).out[0]
        assert branches.sink_sparse == pytest.approx(1 - float(sparse.sum(-1).mean()), abs=1e-5)
        gates = torch.tensor([1.0, 0.0]) if here["gates"] is None else here["gates"][0]
        means = gates.expand(70, 4, 2).mean((0, 1)).tolist()
        assert [branches.gate_sparse, branches.gate_window] == pytest.approx(means)
        (needle,) = (found for found in seen.needle[0] if found.layer == layer)
        read = gates.expand(70, 4, 2)[69, :, 0] * sparse[69, :, 2]
        assert needle.read == pytest.approx(float(read.mean()), abs=1e-5)
        assert needle.top_head_read == pytest.approx(float(read.max()), abs=1e-5)
        if switches.get("window_kv") == "none":
            assert branches.sink_window == 0
            continue
        k = server["k"] if switches.get("window_kv") == "shared" else here["k"]
        window = sliding_window_attention(
            here["q"], k, one_hot, window_tokens=8, sinks=sinks[:, 1], **options
        ).out[0]
        assert branches.sink_window == pytest.approx(1 - float(window.sum(-1).mean()), abs=1e-5)


def test_a_converted_model_is_looked_at_as_it_runs() -> None:
    subject = gated("qwen3")
    seen, hidden = look(subject, Reading(IDS, "", None, [5, 40, 50]), lambda *at: None)
    expected, layers = observed(subject, IDS)
    assert torch.equal(hidden, expected)
    assert list(seen.selections) == [0, 3]
    for layer, selection in seen.selections.items():
        assert torch.equal(selection, layers[layer]["block_idx"][0])
    fit, answer_fit = seen.fits[1]
    assert fit is not None and answer_fit is not None
    assert (fit.queries, answer_fit.queries) == (54, 2)  # query 5 has nothing to choose


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and not tensor.is_sparse:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 8)
        return made


def test_no_map_of_tokens_by_tokens_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 400
    for place in ("hysparse_cli.inspect_topk.blocks", "hysparse_kernels.reference"):
        monkeypatch.setattr(f"{place}.SLAB_LOGITS", {"cpu": 1 << 14})
    monkeypatch.setattr("hysparse_kernels.reference.SLAB_GATHERED", {"cpu": 1 << 14})
    subject = gated("qwen3")
    ids = (torch.arange(tokens) % 90 + 3).tolist()
    asked = Asked(needle=(20, 21), answer=(tokens, tokens))
    with _Largest() as largest:
        seen, _ = look(subject, Reading(ids, "", asked, [tokens - 1]), lambda *at: None)
        maps = selection_maps(seen.selections[0], 8)
        movements(seen.selections[0], subject.sizes)
    assert len(maps) == 2 and seen.overlap[0] is not None
    assert 0 < largest.elements < tokens * tokens / 3


def test_damaged_weights_are_said_to_be(
    hysparse: Hysparse, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = next(path for path in tiny_checkpoint.glob("*.safetensors"))
    tensors = load_file(path)
    for values in tensors.values():
        values.fill_(torch.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    npz = tmp_path / "out.npz"
    run = hysparse("inspect-topk", tiny_checkpoint, "--prompt", "w1 w2", "--npz", npz)
    assert run.exit_code == 7 and run.stderr.count("\n") == 1 and run.stdout == ""
    assert "gives NaN or infinity on the prompt" in run.stderr and not npz.exists()


def test_a_checkpoint_of_a_newer_version_is_refused(
    hysparse: Hysparse, tiny_converted: Path
) -> None:
    config = json.loads((tiny_converted / "config.json").read_text())
    config["hysparse"]["version"] = 99
    (tiny_converted / "config.json").write_text(json.dumps(config))
    run = hysparse("inspect-topk", tiny_converted)
    assert run.exit_code == 4 and "install a newer hysparse" in run.stderr
    assert run.stderr.count("\n") == 1


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
