"""The specification against loops over the paper's equations, and its edge cases."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import hysparse_kernels as ops
from hysparse_kernels import KeyRange, reference
from tests.kernels.brute_force import best_blocks, block_scores, softmax_over, weighted

BLOCK, TOP, WINDOW = 4, 2, 5


@dataclass
class Case:
    """Random inputs; ``first`` and ``mask`` make padding, packing and holes."""

    tokens: int = 11
    queries: int = 11
    heads: int = 4
    kv_heads: int = 2
    dim: int = 3
    v_dim: int = 3
    first: Tensor | None = None
    mask: Tensor | None = None
    sinks: bool = False
    softcap: float | None = None
    batch: int = 2

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        q = torch.randn(self.batch, self.queries, self.heads, self.dim, generator=g)
        k = torch.randn(self.batch, self.tokens, self.kv_heads, self.dim, generator=g)
        v = torch.randn(self.batch, self.tokens, self.kv_heads, self.v_dim, generator=g)
        return (2 * q).to(dtype), (2 * k).to(dtype), v.to(dtype)

    def sink_values(self) -> Tensor | None:
        return torch.linspace(-1, 2, self.heads, dtype=torch.float64) if self.sinks else None

    def key_range(self) -> KeyRange:
        last = torch.arange(self.tokens - self.queries, self.tokens)[None]
        return KeyRange(self.first, last, self.mask)

    def options(self) -> dict[str, object]:
        return {"key_range": self.key_range(), "sinks": self.sink_values(), "softcap": self.softcap}

    def keys_seen(self, b: int, t: int) -> tuple[int, list[int]]:
        first = 0 if self.first is None else int(self.first.expand(self.batch, -1)[b, t])
        last = self.tokens - self.queries + t
        real = [True] * self.tokens if self.mask is None else self.mask[b].tolist()
        return first, [i for i in range(first, last + 1) if real[i]]


HOLES = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 11], dtype=torch.bool)
CASES = {
    "plain": Case(),
    "one query, a cache": Case(queries=1),
    "last block partial, fewer blocks than K": Case(tokens=3, queries=3),
    "one token": Case(tokens=1, queries=1),
    "one head a group": Case(heads=2),
    "group of seven": Case(heads=7, kv_heads=1),
    "sinks": Case(sinks=True),
    "softcap": Case(softcap=1.5, sinks=True),
    "values wider than keys": Case(v_dim=5),
    "left padding": Case(first=torch.tensor([[0], [5]]).expand(2, 11)),
    "packed": Case(first=torch.tensor([[0] * 3 + [3] * 6 + [9] * 2])),
    "holes": Case(mask=HOLES),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture(params=["masked", "gathered", "masked, a slab a query", "gathered, a slab a query"])
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's ways to the same result, whichever the sizes would choose."""
    way, _, slabs = request.param.partition(", ")
    monkeypatch.setattr(reference, "GATHER_BELOW", 0 if way == "masked" else 1e9)
    if slabs:
        monkeypatch.setitem(reference.SLAB_LOGITS, "cpu", 1)
        monkeypatch.setitem(reference.SLAB_GATHERED, "cpu", 1)


def loops(case: Case, chosen: Tensor | None = None, window: int | None = None) -> Tensor:
    """Attention by brute force: over all keys, over chosen blocks, or over a window."""
    q, k, v = case.inputs()
    sinks, group = case.sink_values(), case.heads // case.kv_heads
    out = torch.zeros(*q.shape[:3], case.v_dim, dtype=torch.float64)
    for b in range(case.batch):
        for t in range(case.queries):
            first, keys = case.keys_seen(b, t)
            for h in range(case.heads):
                g, seen = h // group, keys
                if chosen is not None:
                    blocks = set(chosen[b, t, g].tolist())
                    seen = [i for i in keys if (i - first) // BLOCK in blocks]
                if window is not None:
                    own = case.tokens - case.queries + t
                    seen = [i for i in keys if i > own - window]
                sink = None if sinks is None else float(sinks[h])
                scale = case.dim**-0.5
                p = softmax_over(q[b, t, h], k[b, :, g], seen, scale, sink, case.softcap)
                out[b, t, h] = weighted(v[b, :, g], p)
    return out


def assert_agree(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_ways")
def test_full_attention_its_scores_and_its_selection(case: Case) -> None:
    q, k, v = case.inputs()
    result = ops.full_attention(
        q, k, v, block_size=BLOCK, top_k_blocks=TOP, return_block_scores=True, **case.options()
    )
    assert_agree(result.out, loops(case))
    assert result.block_idx is not None and result.block_scores is not None
    sinks, group = case.sink_values(), case.heads // case.kv_heads
    for b in range(case.batch):
        for t in range(case.queries):
            first, keys = case.keys_seen(b, t)
            for g in range(case.kv_heads):
                per_head = [
                    softmax_over(
                        q[b, t, h],
                        k[b, :, g],
                        keys,
                        case.dim**-0.5,
                        None if sinks is None else float(sinks[h]),
                        case.softcap,
                    )
                    for h in range(g * group, (g + 1) * group)
                ]
                scores = block_scores(per_head, first, result.block_scores.shape[-1], BLOCK)
                assert_agree(
                    result.block_scores[b, t, g], torch.tensor(scores, dtype=torch.float64)
                )
                best = best_blocks(scores, {(i - first) // BLOCK for i in keys}, TOP)
                padded = best + [-1] * (TOP - len(best))
                assert result.block_idx[b, t, g].tolist() == padded


@pytest.mark.usefixtures("_ways")
def test_block_sparse_attention(case: Case) -> None:
    q, k, v = case.inputs()
    chosen = ops.full_attention(
        q, k, v, block_size=BLOCK, top_k_blocks=TOP, **case.options()
    ).block_idx
    assert chosen is not None
    chosen = chosen.flip(-1)  # pads anywhere, any order
    result = ops.block_sparse_attention(q, k, v, chosen, block_size=BLOCK, **case.options())
    assert_agree(result.out, loops(case, chosen=chosen))


@pytest.mark.usefixtures("_ways")
def test_sliding_window_attention(case: Case) -> None:
    q, k, v = case.inputs()
    result = ops.sliding_window_attention(q, k, v, window_tokens=WINDOW, **case.options())
    assert_agree(result.out, loops(case, window=WINDOW))


def test_the_gated_sum_is_equations_8_and_9() -> None:
    o, w = torch.randn(2, 1, 2, 3, 5, dtype=torch.float64).unbind()
    logits = torch.randn(1, 2, 3, 2, dtype=torch.float64)
    gates = 1 / (1 + (-logits).exp())
    assert_agree(ops.gated_sum(o, w, logits), gates[..., :1] * o + gates[..., 1:] * w)


def test_all_blocks_selected_is_full_attention_and_the_lse_agrees(case: Case) -> None:
    q, k, v = case.inputs()
    full = ops.full_attention(q, k, v, **case.options())
    blocks = torch.arange(-(-case.tokens // BLOCK)).expand(*q.shape[:2], case.kv_heads, -1)
    sparse = ops.block_sparse_attention(q, k, v, blocks, block_size=BLOCK, **case.options())
    assert_agree(sparse.out, full.out)
    assert_agree(sparse.lse, full.lse)


@pytest.mark.usefixtures("_ways")
@pytest.mark.parametrize("op", ["full", "sparse", "window"])
@pytest.mark.parametrize("name", ["sinks", "softcap", "left padding", "packed", "holes"])
def test_gradients_match_finite_differences(op: str, name: str) -> None:
    case = CASES[name]
    q, k, v = (x[:1].detach().requires_grad_() for x in case.inputs())
    narrow = Case(**{**vars(case), "batch": 1})
    if narrow.first is not None:
        narrow.first = narrow.first[-1:]
    if narrow.mask is not None:
        narrow.mask = narrow.mask[:1]
    sinks = torch.linspace(-1, 1, case.heads, dtype=torch.float64, requires_grad=True)
    options = {**narrow.options(), "sinks": sinks}
    idx = ops.full_attention(q, k, v, block_size=BLOCK, top_k_blocks=TOP, **options).block_idx

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        options["sinks"] = sinks
        if op == "full":
            return ops.full_attention(q, k, v, **options).out
        if op == "sparse":
            return ops.block_sparse_attention(q, k, v, idx, block_size=BLOCK, **options).out
        return ops.sliding_window_attention(q, k, v, window_tokens=WINDOW, **options).out

    assert torch.autograd.gradcheck(run, (q, k, v, sinks), fast_mode=True)


def test_a_row_that_sees_no_key_is_zero_and_its_gradient_finite() -> None:
    case = Case(mask=torch.tensor([[0] * 4 + [1] * 7, [1] * 11], dtype=torch.bool))
    q, k, v = (x.requires_grad_() for x in case.inputs())
    full = ops.full_attention(q, k, v, block_size=BLOCK, top_k_blocks=TOP, **case.options())
    assert full.block_idx is not None
    sparse = ops.block_sparse_attention(q, k, v, full.block_idx, block_size=BLOCK, **case.options())
    window = ops.sliding_window_attention(q, k, v, window_tokens=WINDOW, **case.options())
    for result in (full, sparse, window):
        assert result.out[0, :4].eq(0).all() and result.lse[0, :4].isneginf().all()
    assert full.block_idx[0, :4].eq(-1).all()
    (full.out.sum() + sparse.out.sum() + window.out.sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_ties_go_to_the_earlier_block() -> None:
    q = torch.zeros(1, 1, 1, 2)
    k = v = torch.zeros(1, 12, 1, 2)
    result = ops.full_attention(q, k, v, block_size=4, top_k_blocks=2)
    assert result.block_idx is not None and result.block_idx.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    case = Case()
    q, k, v = case.inputs(dtype)
    exact = ops.full_attention(q.double(), k.double(), v.double()).out
    result = ops.full_attention(q, k, v)
    assert result.out.dtype == dtype and result.lse.dtype == torch.float32
    torch.testing.assert_close(result.out, exact.to(dtype), rtol=0, atol=torch.finfo(dtype).eps)


def test_an_empty_batch() -> None:
    q, k = torch.zeros(0, 3, 4, 2), torch.zeros(0, 3, 2, 2)
    result = ops.full_attention(q, k, k, block_size=4, top_k_blocks=2)
    assert result.out.shape == (0, 3, 4, 2)
    assert result.block_idx is not None and result.block_idx.shape == (0, 3, 2, 2)
    assert ops.sliding_window_attention(q, k, k, window_tokens=2).out.shape == (0, 3, 4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 5, 3, 4), "v": (2, 5, 3, 4)}, "H be a multiple of G"),
        ({"v": (2, 6, 2, 4)}, r"expected \(B, T, H, D\)"),
        ({"q": (2, 5, 4, 8)}, "B and D must agree"),
        ({"sinks": (3,)}, r"sinks has shape \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    change: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes = {"q": (2, 5, 4, 4), "k": (2, 5, 2, 4), "v": (2, 5, 2, 4), "sinks": (4,)} | change
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        ops.full_attention(**tensors)


def test_options_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 2, 4)
    with pytest.raises(ValueError, match="need block_size"):
        ops.full_attention(q, k, k, top_k_blocks=2)
    with pytest.raises(ValueError, match="block_size is 0"):
        ops.full_attention(q, k, k, block_size=0)
    with pytest.raises(ValueError, match="expected one floating dtype"):
        ops.full_attention(q, k, k.double())
    with pytest.raises(ValueError, match=r"block_idx has shape \(1, 5, 4, 2\)"):
        ops.block_sparse_attention(q, k, k, torch.zeros(1, 5, 4, 2), block_size=4)
    with pytest.raises(ValueError, match="gate_logits"):
        ops.gated_sum(q, q, torch.zeros(1, 5, 4))
