"""hysparse inspect-topk: statistics against brute force, and its command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hysparse_cli.inspect_topk.report import FAINT, HIDDEN, NEVER, SHADES, _shade
from hysparse_cli.inspect_topk.stats import LayerInputs, fit_of, selection_maps
from torch import Tensor

from hysparse_kernels import causal, full_attention
from tests.conftest import Hysparse

T, H, G, D = 70, 4, 2, 8
BLOCK, KEPT, WINDOW = 8, 3, 6


@pytest.fixture(params=[7, 512])
def inputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LayerInputs:
    """A layer that reads the selection of another, seen through short slabs and a long one."""
    monkeypatch.setattr("hysparse_cli.inspect_topk.stats.SLAB_QUERIES", request.param)
    torch.manual_seed(0)
    key_range = causal(T, T, torch.device("cpu"))
    server = [3 * torch.randn(1, T, heads, D) for heads in (H, G, G)]
    selected = full_attention(
        *server, key_range=key_range, block_size=BLOCK, top_k_blocks=KEPT
    ).block_idx
    assert selected is not None
    q, k, v = (2 * torch.randn(1, T, heads, D) for heads in (H, G, G))
    return LayerInputs(q, k, v, key_range, D**-0.5, None, selected, BLOCK, WINDOW)


def _probabilities(inputs: LayerInputs) -> Tensor:
    """(H, T, T) of the layer's own full attention."""
    k = inputs.k.repeat_interleave(H // G, 2)
    logits = torch.einsum("bthd,bshd->hts", inputs.q, k) * inputs.scale
    return logits.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)


def _brute_force(inputs: LayerInputs) -> tuple[int, float, float, float]:
    """Queries that choose, recall, mass selected and mass in the window, key by key."""
    probabilities = _probabilities(inputs)
    recalls, selected, window = [], [], []
    for t in range(T):
        if t // BLOCK + 1 <= KEPT:
            continue
        for head in range(H):
            row = probabilities[head, t]
            given = set(inputs.block_idx[0, t, head // (H // G)].tolist())
            selected.append(sum(float(row[s]) for s in range(t + 1) if s // BLOCK in given))
            window.append(float(row[t - WINDOW + 1 : t + 1].sum()))
        for group in range(G):
            rows = probabilities[group * 2 : group * 2 + 2, t, : t + 1]
            best = [float(rows[:, b : b + BLOCK].max()) for b in range(0, t + 1, BLOCK)]
            own = sorted(range(len(best)), key=lambda b: -best[b])[:KEPT]
            given = set(inputs.block_idx[0, t, group].tolist())
            recalls.append(len(given & set(own)) / KEPT)
    means = (sum(values) / len(values) for values in (recalls, selected, window))
    return T - KEPT * BLOCK, *means  # type: ignore[return-value]


def test_fit_equals_brute_force(inputs: LayerInputs) -> None:
    queries, recall, selected, window = _brute_force(inputs)
    fit = fit_of(inputs, seed=0)
    assert fit is not None
    assert fit.queries == queries
    assert fit.recall == pytest.approx(recall, abs=1e-6)
    assert fit.mass_selected == pytest.approx(selected, abs=1e-5)
    assert fit.mass_window == pytest.approx(window, abs=1e-5)
    assert sum(fit.recall_by_kv_head) / G == pytest.approx(fit.recall)
    assert fit.mass_selected < fit.mass_own_best < 1


def test_random_baseline_is_what_chance_gives(inputs: LayerInputs) -> None:
    fits = [fit_of(inputs, seed=seed) for seed in range(8)]
    expected = [KEPT / (t // BLOCK + 1) for t in range(KEPT * BLOCK, T)]
    measured = [fit.recall_random for fit in fits if fit is not None]
    assert sum(measured) / 8 == pytest.approx(sum(expected) / len(expected), abs=0.03)


def test_a_layer_fits_its_own_selection(inputs: LayerInputs) -> None:
    own = full_attention(
        inputs.q, inputs.k, inputs.v, block_size=BLOCK, top_k_blocks=KEPT, scale=inputs.scale
    ).block_idx
    assert own is not None
    fit = fit_of(LayerInputs(**{**vars(inputs), "block_idx": own}), seed=0)
    assert fit is not None and fit.recall == 1.0
    assert fit.mass_selected == pytest.approx(fit.mass_own_best)


def test_no_fit_where_no_query_chooses(inputs: LayerInputs) -> None:
    short = slice(0, KEPT * BLOCK)
    parts = {name: getattr(inputs, name)[:, short] for name in ("q", "k", "v", "block_idx")}
    key_range = causal(KEPT * BLOCK, KEPT * BLOCK, torch.device("cpu"))
    assert fit_of(LayerInputs(**{**vars(inputs), **parts, "key_range": key_range}), 0) is None


def test_maps_equal_brute_force(inputs: LayerInputs) -> None:
    blocks = -(-T // BLOCK)
    maps = selection_maps(inputs)
    assert len(maps) == G and len(maps[0]) == blocks and len(maps[0][0]) == blocks
    for group in range(G):
        for row in range(blocks):
            queries = [t for t in range(T) if t * blocks // T == row]
            for column in range(blocks):
                seen = [t for t in queries if t // BLOCK >= column]
                got = maps[group][row][column]
                if not seen:
                    assert got is None
                    continue
                hits = sum(column in inputs.block_idx[0, t, group].tolist() for t in seen)
                assert got == pytest.approx(hits / len(seen))


def test_shades_read_without_colour() -> None:
    shades = [_shade(value)[0] for value in (None, 0.0, 0.1, 0.3, 0.6, 0.9)]
    assert shades == [HIDDEN, NEVER[0], FAINT[0], *(letter for _, letter, _ in SHADES[::-1])]


def _prompt(words: int) -> str:
    return " ".join(f"w{11 * i % 61}" for i in range(words))


def test_inspect_prints_maps_and_fits_at_80_columns(
    hysparse: Hysparse, tiny_converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = hysparse("inspect-topk", tiny_converted, "--prompt", _prompt(60))
    assert run.exit_code == 0, run.stderr
    lines = run.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "Layer 0, serves 1, 2" in lines
    assert any("KV head 0" in line and "KV head 1" in line for line in lines)
    assert "means over the 44 queries" in run.stdout
    assert "…" not in run.stdout


def test_inspect_json(hysparse: Hysparse, tiny_converted: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text(_prompt(90))
    args = ("inspect-topk", tiny_converted, "--data", data, "--max-tokens", 60, "--json")
    result: dict[str, Any] = json.loads(hysparse(*args).stdout)
    assert result["schema"] == "hysparse.inspect-topk/1" and result["tokens"] == 60
    (full,) = result["full_layers"]
    assert (full["layer"], full["serves"], len(full["maps"])) == (0, [1, 2], 2)
    first, second = result["served_layers"]
    assert (first["layer"], second["layer"], first["server"]) == (1, 2, 0)
    assert first["gate_sparse"] == first["gate_window"] == 0.5
    assert 0 < first["fit"]["mass_selected"] <= 1 and 0 <= first["fit"]["recall"] <= 1


def test_a_short_text_says_that_nothing_was_chosen(
    hysparse: Hysparse, tiny_converted: Path
) -> None:
    run = hysparse("inspect-topk", tiny_converted, "--prompt", _prompt(10))
    assert run.exit_code == 0 and "give a" in run.stdout


def test_layers_that_select_nothing_are_refused(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path
) -> None:
    run = hysparse("inspect-topk", tiny_original, "--prompt", "w1")
    assert run.exit_code == 3
    assert "is a dense model" in run.stderr and run.stderr.count("\n") == 1
    swa = tmp_path / "swa"
    assert hysparse("convert", tiny_original, swa, "--layout", "hybrid-swa").exit_code == 0
    run = hysparse("inspect-topk", swa, "--prompt", "w1")
    assert run.exit_code == 3
    assert "hybrid-swa" in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        ([], 3, "either --prompt or --data"),
        (["--prompt", "w1", "--data", "x.txt"], 3, "either --prompt or --data"),
        (["--prompt", " "], 7, "the prompt holds no text"),
        (["--data", "absent.txt"], 7, "absent.txt"),
    ],
)
def test_errors_are_one_line(
    hysparse: Hysparse, tiny_converted: Path, args: list[str], exit_code: int, message: str
) -> None:
    run = hysparse("inspect-topk", tiny_converted, *args)
    assert run.exit_code == exit_code
    assert message in run.stderr and run.stderr.count("\n") == 1 and run.stdout == ""
