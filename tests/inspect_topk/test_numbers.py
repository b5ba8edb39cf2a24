"""inspect-topk's arithmetic against brute force, key by key, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hysparse_cli.inspect_topk.blocks import (
    LayerInputs,
    Sizes,
    block_shares,
    even_blocks,
)
from hysparse_cli.inspect_topk.selection import LAGS, movements, selection_maps, visible_pairs
from hysparse_cli.inspect_topk.statistics import FitSums
from hysparse_kernels import full_attention
from hysparse_kernels.selection import select_blocks

T, H, G, D = 70, 4, 2, 8
SIZES = Sizes(block_size=8, top_k_blocks=3, window_tokens=6)
N = -(-T // SIZES.block_size)
FIRST = 24


@pytest.fixture(params=[T * H * 7, 1 << 20], ids=["slabs of 7", "one slab"])
def slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hysparse_cli.inspect_topk.blocks.SLAB_LOGITS", {"cpu": request.param})


def made_inputs(seed: int, **options: Any) -> LayerInputs:
    torch.manual_seed(seed)
    q, k = (2 * torch.randn(1, T, heads, D, dtype=torch.float64) for heads in (H, G))
    return LayerInputs(q, k, D**-0.5, **options)


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)},
}


def probabilities(inputs: LayerInputs) -> Tensor:
    """(H, T, T) of the layer's own full attention."""
    k = inputs.k.repeat_interleave(H // G, 2)
    logits = torch.einsum("bthd,bshd->hts", inputs.q, k) * inputs.scale
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    sinks = torch.full((H,), -torch.inf) if inputs.sinks is None else inputs.sinks
    return torch.cat([logits, sinks[:, None, None].expand(H, T, 1)], -1).softmax(-1)[..., :T]


def own_blocks(inputs: LayerInputs) -> Tensor:
    """(T, G, K), as the model's op selects."""
    options = {"scale": inputs.scale, "softcap": inputs.softcap, "sinks": inputs.sinks}
    found = full_attention(
        inputs.q, inputs.k, inputs.k, block_size=8, top_k_blocks=SIZES.top_k_blocks, **options
    ).block_idx
    assert found is not None
    return found[0]


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_block_shares_equal_brute_force(options: dict[str, Any]) -> None:
    inputs = made_inputs(0, **options)
    expected = probabilities(inputs)
    seen, selected = 0, []
    for shares in block_shares(inputs, SIZES):
        assert shares.begin == seen
        seen = shares.end
        selected.append(select_blocks(shares.log_score, SIZES.top_k_blocks))
        for t in range(shares.begin, shares.end):
            at = t - shares.begin
            assert float(shares.lse[at].exp().sum()) > 0
            for block in range(N):
                keys = range(block * 8, min(T, block * 8 + 8))
                part = expected[:, t, keys.start : keys.stop]
                torch.testing.assert_close(shares.mass[at, :, block], part.sum(-1))
                recent = [s for s in keys if t - SIZES.window_tokens < s <= t]
                window = expected[:, t, recent].sum(-1)
                torch.testing.assert_close(shares.window[at, :, block], window)
                score = part.amax(-1).view(G, -1).amax(-1)
                torch.testing.assert_close(shares.log_score[at, :, block].exp(), score)
    assert seen == T
    assert torch.equal(torch.cat(selected), own_blocks(inputs))


def brute_fit(inputs: LayerInputs, given: Tensor, queries: list[int]) -> dict[str, float]:
    """Sums over keys, one query and head at a time."""
    rows, own = probabilities(inputs), own_blocks(inputs)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for t in queries:
        visible = t // 8 + 1
        even = {round(i * (visible - 1) / 2 - 0.01) for i in range(3)}
        note("recall_random", 3 / visible)
        for group in range(G):
            best, has = set(own[t, group].tolist()), set(given[t, group].tolist())
            note("recall", len(best & has) / 3)
            note("recall_even", len(best & even) / 3)
            for head in range(2 * group, 2 * group + 2):
                row = rows[head, t].tolist()
                recent = range(t - SIZES.window_tokens + 1, t + 1)
                note("mass_selected", sum(row[s] for s in range(T) if s // 8 in has))
                note("mass_own_best", sum(row[s] for s in range(T) if s // 8 in best))
                note("mass_even", sum(row[s] for s in range(T) if s // 8 in even))
                note("mass_random", sum(row) * 3 / visible)
                note("mass_window", sum(row[s] for s in recent))
                note("mass_seen", sum(row[s] for s in range(T) if s // 8 in has or s in recent))
                note("mass_first_block", sum(row[:8]))
                note("mass_sink", 1 - sum(row))
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fit_equals_brute_force(options: dict[str, Any], some: bool) -> None:
    inputs, given = made_inputs(1, **options), own_blocks(made_inputs(2))
    asked = torch.zeros(T, dtype=torch.bool)
    asked[[3, 30, 31, 57]] = True
    sums = FitSums(SIZES, asked if some else None)
    for shares in block_shares(inputs, SIZES):
        here = slice(shares.begin, shares.end)
        sums.add(shares, given[here], select_blocks(shares.log_score, 3))
    fit = sums.fit()
    assert fit is not None
    queries = [30, 31, 57] if some else list(range(FIRST, T))
    assert fit.queries == len(queries)
    for name, expected in brute_fit(inputs, given, queries).items():
        assert getattr(fit, name) == pytest.approx(expected, abs=1e-6), name
    assert sum(fit.recall_by_kv_head) / G == pytest.approx(fit.recall)


def test_no_fit_where_no_query_chooses() -> None:
    inputs = made_inputs(1)
    short = inputs._replace(q=inputs.q[:, :FIRST], k=inputs.k[:, :FIRST])
    sums = FitSums(SIZES)
    for shares in block_shares(short, SIZES):
        best = select_blocks(shares.log_score, 3)
        sums.add(shares, best, best)
    assert sums.fit() is None
    assert movements(own_blocks(made_inputs(0))[:FIRST], SIZES) is None


def test_even_blocks_go_from_the_first_to_the_querys_own() -> None:
    blocks = even_blocks(torch.tensor([24, 39, 69]), SIZES)
    assert blocks.tolist() == [[0, 1, 3], [0, 2, 4], [0, 4, 8]]
    one = even_blocks(torch.tensor([69]), SIZES._replace(top_k_blocks=1))
    assert one.tolist() == [[0]]


def brute_map(selection: Tensor, group: int, queries: list[int], blocks: list[int]) -> float | None:
    pairs = [(t, n) for t in queries for n in blocks if n <= t // 8]
    hits = sum(n in selection[t, group].tolist() for t, n in pairs)
    return hits / len(pairs) if pairs else None


def test_maps_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"ROWS": 6, "COLUMNS": 4, "SLAB_QUERIES": 9}.items():
        monkeypatch.setattr(f"hysparse_cli.inspect_topk.selection.{name}", size)
    selection = own_blocks(made_inputs(3))
    maps = selection_maps(selection, 8)
    assert len(maps) == G
    for group, cells in enumerate(maps):
        for r in range(6):
            for c in range(4):
                queries = [t for t in range(T) if t * 6 // T == r]
                blocks = [n for n in range(N) if n * 4 // N == c]
                expected = brute_map(selection, group, queries, blocks)
                assert cells[r][c] == (
                    None if expected is None else pytest.approx(expected, abs=1e-6)
                )
    assert int(visible_pairs(T, 8).sum()) == sum(t // 8 + 1 for t in range(T))


def test_movement_equals_brute_force() -> None:
    selection = own_blocks(made_inputs(4))
    lists = selection.tolist()
    found = movements(selection, SIZES)
    assert found is not None and len(found) == G
    for group, movement in enumerate(found):
        for lag, kept, chance in zip(LAGS, movement.kept, movement.kept_random, strict=True):
            pairs = [(t, t - lag) for t in range(FIRST + lag, T)]
            if not pairs:
                assert kept is chance is None
                continue
            shares = [len({*lists[a][group]} & {*lists[b][group]}) / 3 for a, b in pairs]
            assert kept == pytest.approx(sum(shares) / len(pairs))
            expected = sum(3 / (a // 8 + 1) for a, _ in pairs) / len(pairs)
            assert chance == pytest.approx(expected)
        back = [t // 8 - n for t in range(FIRST, T) for n in lists[t][group]]
        of_chance = [
            sum(
                1 / (t // 8 + 1)
                for t in range(FIRST, T)
                for n in range(t // 8 + 1)
                if t // 8 - n in r
            )
            / (T - FIRST)
            for r in (range(1), range(1, 2), range(2, 4), range(4, 8), range(8, 16))
        ]
        bins = [
            sum(d in r for d in back)
            for r in (range(1), range(1, 2), range(2, 4), range(4, 8), range(8, 16))
        ]
        assert movement.distances == pytest.approx([n / len(back) for n in bins])
        assert movement.distances_random == pytest.approx(of_chance)
