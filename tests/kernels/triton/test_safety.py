"""What must never go wrong silently: odd shapes and strides, rows without keys, huge tensors."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import hysparse_kernels as ops
from hysparse_kernels import KeyRange, backends, causal
from tests.kernels.tolerance import (
    assert_within_tolerance,
    plain_attention,
    visible_blocks,
    visible_keys,
    visible_window,
)

BLOCK, TOP, WINDOW = 16, 2, 20
Op = Callable[[Tensor, Tensor, Tensor, Tensor, KeyRange], Tensor]


def full(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, seen: KeyRange) -> Tensor:
    return ops.full_attention(q, k, v, key_range=seen, block_size=BLOCK, top_k_blocks=TOP).out


def sparse(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, seen: KeyRange) -> Tensor:
    return ops.block_sparse_attention(q, k, v, lists, block_size=BLOCK, key_range=seen).out


def window(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, seen: KeyRange) -> Tensor:
    return ops.sliding_window_attention(q, k, v, window_tokens=WINDOW, key_range=seen).out


OPS = [full, sparse, window]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "triton")


def visible(op: Op, seen: KeyRange, num_keys: int, lists: Tensor) -> Tensor:
    if op is full:
        return visible_keys(seen, num_keys)
    if op is window:
        return visible_window(seen, num_keys, WINDOW)
    return visible_blocks(seen, num_keys, lists, BLOCK)


def draw(where: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(where, dtype)


def some_lists(where: str, batch: int, queries: int, kv_heads: int) -> Tensor:
    """Blocks 1 and 0, whether a query sees them or not, with a pad between."""
    lists = torch.tensor([1, -1, 0], dtype=torch.int32, device=where)
    return lists.expand(batch, queries, kv_heads, 3)


def check(op: Op, q: Tensor, k: Tensor, v: Tensor, lists: Tensor, seen: KeyRange) -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(
            q, k, v, visible(op, seen, k.shape[1], lists), scale=q.shape[3] ** -0.5
        )

    d_out = draw(str(q.device), *q.shape[:3], v.shape[3], dtype=q.dtype)
    columns = []
    for run, inputs in (
        (lambda *x: op(*x, lists, seen), (q, k, v)),
        (plain, (q, k, v)),
        (plain, (q.double(), k.double(), v.double())),
    ):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = run(*leaves)
        columns.append((out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))))
    for name, ours, theirs, truth in zip(("out", "dq", "dk", "dv"), *columns, strict=True):
        assert_within_tolerance(ours, theirs, truth, gradient=name != "out", name=name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no batch", "no queries"])
def test_nothing_in_nothing_out(op: Op, shape: tuple[int, int], where: str) -> None:
    batch, queries = shape
    q, k = draw(where, batch, queries, 4, 16), draw(where, batch, 5, 2, 16)
    seen = causal(queries, 5, k.device)
    assert op(q, k, k, some_lists(where, batch, queries, 2), seen).shape == (batch, queries, 4, 16)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", [3, 40], ids=["below one block", "several blocks"])
def test_rows_without_keys_are_zero_and_strides_are_any(op: Op, tokens: int, where: str) -> None:
    """The first five slots are no tokens. Keys lie (B, G, S, D) in memory, queries (H, T)."""
    q = draw(where, 2, 4, tokens, 16).transpose(1, 2)
    k, v = (draw(where, 2, 2, tokens + n, 32)[:, :, :tokens, 3:19].transpose(1, 2) for n in (0, 1))
    seen = causal(tokens, tokens, q.device)
    mask = torch.ones(2, tokens, dtype=torch.bool, device=where)
    mask[0, :5] = False
    seen = KeyRange(None, seen.last, mask)
    lists = some_lists(where, 2, tokens, 2)
    check(op, q, k, v, lists, seen)
    assert op(q, k, v, lists, seen)[0, :5].eq(0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.parametrize("op", OPS)
def test_sizes_drawn_at_random(op: Op, data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, 400), "queries")
    tokens = queries + data.draw(st.sampled_from([0, 1, 77]), "tokens before")
    group, dim = data.draw(st.sampled_from([(4, 128), (7, 80)]), "group, head dim")
    dtype = torch.bfloat16
    batch = data.draw(st.integers(1, 3), "batch")
    q = draw("cuda", batch, queries, 2 * group, dim, dtype=dtype)
    k, v = (draw("cuda", batch, tokens, 2, dim, dtype=dtype) for _ in range(2))
    seen = causal(queries, tokens, q.device)
    first = None
    if data.draw(st.booleans(), "packed"):
        cuts = sorted(data.draw(st.lists(st.integers(0, queries), max_size=3), "documents"))
        starts = torch.zeros(batch, queries, dtype=torch.long, device="cuda")
        for cut in cuts:
            starts[:, cut:] = cut + tokens - queries
        first = starts
    seen = seen if first is None else KeyRange(first, seen.last)
    chance = torch.Generator("cuda").manual_seed(tokens)
    sizes = (batch, queries, 2, 1)
    lists = torch.randint(-1, tokens // BLOCK + 1, sizes, device="cuda", generator=chance)
    lists = torch.cat([lists, lists + tokens // BLOCK + 2], dim=3).int()  # distinct; some unseen
    check(op, q, k, v, lists, seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", [sparse, window])
@torch.no_grad()
def test_more_elements_than_32_bits_count(op: Op) -> None:
    """2.4 G elements of q: the last rows, alone, must come out the same."""
    tokens, last = 600_000, 64
    q = torch.randn(1, tokens, 32, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, tokens, 1, 128, device="cuda", dtype=torch.bfloat16)
    seen = causal(tokens, tokens, q.device)
    lists = torch.arange(3, device="cuda", dtype=torch.int32) * (tokens // BLOCK // 4)
    lists = lists.expand(1, tokens, 1, 3)
    out = op(q, k, k, lists, seen)[:, -last:]
    part = seen.slab(tokens - last, tokens)
    assert_within_tolerance(
        out,
        plain_attention(
            q[:, -last:], k, k, visible(op, part, tokens, lists[:, -last:]), scale=128**-0.5
        ),
        plain_attention(
            *(x.double() for x in (q[:, -last:], k, k)),
            visible(op, part, tokens, lists[:, -last:]),
            scale=128**-0.5,
        ),
    )
