"""Sliding window attention in Triton, forward and backward, held to the law."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

from hysparse_kernels import KeyRange, causal
from hysparse_kernels.triton.window.backward import window_backward
from hysparse_kernels.triton.window.forward import window_forward
from hysparse_kernels.triton.window.gates import delta
from tests.kernels.tolerance import (
    assert_within_tolerance,
    plain_attention,
    truth_of,
    visible_window,
)


@dataclass(frozen=True)
class Case:
    """Random inputs. ``documents`` packs, ``padding`` pads left, ``holes`` hides keys."""

    tokens: int = 21
    queries: int | None = None
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    v_dim: int | None = None
    window: int = 5
    sinks: bool = True
    softcap: float | None = None
    documents: tuple[int, ...] = ()
    padding: int = 0
    holes: bool = False
    batch: int = 1
    beyond: int = 0
    gate: bool = True

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        queries = self.tokens if self.queries is None else self.queries
        shapes = (
            (self.batch, queries, self.heads, self.dim),
            (self.batch, self.tokens + self.beyond, self.kv_heads, self.dim),
            (self.batch, self.tokens + self.beyond, self.kv_heads, self.v_dim or self.dim),
        )
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        return (2 * q).to(device, dtype), k.to(device, dtype), v.to(device, dtype)

    def key_range(self, device: str) -> KeyRange:
        queries = self.tokens if self.queries is None else self.queries
        last = torch.arange(self.tokens - queries, self.tokens)[None]
        first = mask = None
        if self.documents:
            starts = torch.tensor([0, *self.documents])
            first = starts[torch.searchsorted(starts, last, right=True) - 1]
        if self.padding:
            first = torch.full((self.batch, queries), self.padding)
            first[0] = 0
        if self.holes:
            generator = torch.Generator().manual_seed(1)
            mask = torch.rand(self.batch, self.tokens + self.beyond, generator=generator) < 0.7
            mask = mask.to(device)
        diagonal = None if first is not None or self.holes else self.tokens - queries
        first = None if first is None else first.to(device)
        return KeyRange(first, last.to(device), mask, diagonal)

    def sink_values(self, device: str) -> Tensor | None:
        return torch.linspace(-1, 2, self.heads, device=device) if self.sinks else None


SMALL = {
    "plain": Case(sinks=False, gate=False),
    "sinks, more than a tile": Case(tokens=67, window=40, kv_heads=1),
    "softcap": Case(softcap=1.5, gate=False),
    "a window of one": Case(window=1),
    "wider than the keys": Case(window=1000),
    "one head a group": Case(heads=2),
    "group of seven": Case(heads=7, kv_heads=1),
    "values wider than keys": Case(v_dim=24),
    "left padding": Case(batch=2, padding=9),
    "packed": Case(documents=(3, 9, 10)),
    "holes": Case(batch=2, holes=True),
    "one query, a cache longer than its tokens": Case(queries=1, beyond=3),
    "more queries than keys": Case(tokens=5, queries=9),
}
LARGE = {
    f"{tokens} tokens, {heads}/{kv_heads} x {dim}, window {window}": Case(
        tokens=tokens, heads=heads, kv_heads=kv_heads, dim=dim, v_dim=v_dim, window=window
    )
    for tokens, heads, kv_heads, dim, v_dim, window in (
        (1, 8, 2, 128, None, 128),
        (63, 8, 2, 64, None, 128),
        (65, 8, 2, 80, None, 16),
        (257, 8, 2, 96, None, 128),
        (257, 4, 4, 192, 128, 100),
        (257, 4, 1, 256, None, 128),
        (1023, 8, 2, 128, None, 128),
        (1023, 7, 1, 128, None, 512),
        (1023, 16, 1, 64, None, 1),
        (4500, 4, 2, 128, None, 4096),
    )
} | {
    "a cache": Case(
        tokens=391, queries=130, heads=7, kv_heads=1, dim=80, window=50, batch=2, gate=False
    ),
    "large, padded": Case(batch=2, tokens=333, dim=128, window=128, padding=100),
    "large, packed": Case(tokens=555, dim=128, window=128, documents=(100, 101, 300)),
    "large, holes": Case(batch=2, tokens=333, dim=128, window=128, holes=True),
    "large, softcap": Case(tokens=333, dim=128, window=128, softcap=2.0),
}


def _parametrised() -> list[object]:
    """Small cases in the interpreter and, in bfloat16, on a GPU; large ones on a GPU."""
    given = []
    for name, case in (SMALL | LARGE).items():
        common = name in ("sinks, more than a tile", "1023 tokens, 8/2 x 128, window 128")
        dtypes = {torch.float16: name in SMALL or common, torch.float32: common}
        dtypes[torch.bfloat16] = True
        for dtype in (dtype for dtype, wanted in dtypes.items() if wanted):
            on_gpu = name in LARGE or dtype == torch.bfloat16
            marks = [pytest.mark.gpu] if on_gpu else []
            given.append(pytest.param((case, dtype), id=f"{name}, {str(dtype)[6:]}", marks=marks))
    return given


@pytest.fixture(params=_parametrised())
def given(request: pytest.FixtureRequest, where: str) -> tuple[Case, torch.dtype, str]:
    case, dtype = request.param
    on_gpu = dtype == torch.bfloat16 or case in LARGE.values()
    if on_gpu != (where == "cuda"):
        pytest.skip("for a GPU" if on_gpu else "for the interpreter")
    return case, dtype, where


def test_forward(given: tuple[Case, torch.dtype, str]) -> None:
    case, dtype, device = given
    q, k, v = case.inputs(dtype, device)
    key_range, sinks = case.key_range(device), case.sink_values(device)
    options: dict[str, Any] = {"scale": 0.2, "sinks": sinks, "softcap": case.softcap}
    out, lse, gated = window_forward(q, k, v, key_range, window_tokens=case.window, **options)
    truth = truth_of(
        "sliding_window_attention", q, k, v, key_range, window_tokens=case.window, **options
    )
    visible = visible_window(key_range, k.shape[1], case.window)
    plain = plain_attention(q, k, v, visible, **options)
    assert out is not None and gated is None
    assert_within_tolerance(out, plain, truth.out)
    unseen = truth.lse.isneginf()
    assert torch.equal(lse.isneginf(), unseen)
    lse, plain, wanted = (
        x.masked_fill(unseen, 0.0) for x in (lse, _plain_lse(q, k, visible, **options), truth.lse)
    )
    assert_within_tolerance(lse, plain, wanted, name="lse")


def _plain_lse(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """The log of the softmax's denominator from logits in q's dtype: (B, T, H) float32."""
    logits = torch.einsum("btgrd,bsgd->btgrs", q.unflatten(2, (k.shape[2], -1)), k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible[:, :, :, None], -torch.inf).flatten(2, 3).float()
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None].expand(*logits.shape[:-1], 1)], -1)
    return logits.logsumexp(-1)


@pytest.mark.parametrize("keep_out", [True, False], ids=["", "only the sum"])
def test_forward_with_gates(keep_out: bool, where: str) -> None:
    case = Case(dim=24) if where == "cpu" else Case(tokens=300, heads=8, dim=128, window=128)
    q, k, v = case.inputs(torch.float16, where)
    key_range, sinks = case.key_range(where), case.sink_values(where)
    options: dict[str, Any] = {"scale": 0.2, "sinks": sinks, "softcap": None}
    o_sparse = q.roll(1, 1)
    gate_logits = q[..., :2]
    out, _, gated = window_forward(
        q,
        k,
        v,
        key_range,
        window_tokens=case.window,
        o_sparse=o_sparse,
        gate_logits=gate_logits,
        keep_out=keep_out,
        **options,
    )
    truth = truth_of(
        "sliding_window_attention", q, k, v, key_range, window_tokens=case.window, **options
    )
    visible = visible_window(key_range, k.shape[1], case.window)
    plain = plain_attention(q, k, v, visible, **options)
    assert (out is not None) == keep_out and gated is not None
    if out is not None:
        assert_within_tolerance(out, plain, truth.out)
    gates = gate_logits.sigmoid()
    plain = gates[..., :1] * o_sparse + gates[..., 1:] * plain
    truth_gated = truth_of("gated_sum", o_sparse, truth.out, gate_logits)
    assert_within_tolerance(gated, plain, truth_gated, name="gated")


def test_backward(given: tuple[Case, torch.dtype, str]) -> None:
    case, dtype, device = given
    inputs = case.inputs(dtype, device)
    q, k, v = inputs
    key_range, sinks = case.key_range(device), case.sink_values(device)
    options: dict[str, Any] = {"scale": 0.2, "softcap": case.softcap}
    generator = torch.Generator().manual_seed(2)
    d_out = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(device, dtype)
    dq_add = torch.randn(q.shape, generator=generator).to(device, dtype)
    gate = torch.rand(q.shape[:3], generator=generator).to(device) if case.gate else None
    visible = visible_window(key_range, k.shape[1], case.window)

    def truth(*wide: Tensor) -> Tensor:
        out = truth_of(
            "sliding_window_attention",
            *wide[:3],
            key_range,
            window_tokens=case.window,
            sinks=wide[3] if case.sinks else None,
            **options,
        ).out
        assert isinstance(out, Tensor)
        return out

    def plain(*same: Tensor) -> Tensor:
        return plain_attention(*same[:3], visible, sinks=same[3] if case.sinks else None, **options)

    out, lse, _ = window_forward(
        q, k, v, key_range, window_tokens=case.window, sinks=sinks, **options
    )
    assert out is not None
    gated = d_out if gate is None else gate[..., None] * d_out
    dq, dk, dv, dsinks = window_backward(
        d_out,
        q,
        k,
        v,
        lse,
        delta(gated, out),
        key_range,
        window_tokens=case.window,
        sinks=sinks,
        gate=gate,
        dq_add=dq_add.clone() if case.gate else None,
        **options,
    )
    ours = (dq, dk, dv, dsinks)
    given_sinks = sinks if sinks is not None else torch.zeros(case.heads, device=device)
    wanted = _gradients(truth, gated.double(), *(x.double() for x in (*inputs, given_sinks)))
    theirs = _gradients(plain, gated.to(dtype), *inputs, given_sinks)
    if case.gate:
        wanted[0] += dq_add.double()
        theirs[0] += dq_add
    for name, a, b, c in zip(("dq", "dk", "dv", "dsinks"), ours, theirs, wanted, strict=True):
        if a is not None:
            assert_within_tolerance(a, b, c, gradient=True, name=name)
    assert (dsinks is None) == (sinks is None)


def _gradients(attend: Callable[..., Tensor], d_out: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, d_out, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


def test_strided_inputs(where: str) -> None:
    case = Case(batch=2)
    q, k, v = case.inputs(torch.float16, where)
    key_range = case.key_range(where)
    options: dict[str, Any] = {"window_tokens": 5, "scale": 0.2, "sinks": None, "softcap": None}
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    strided[2] = torch.cat([v, v], -1)[..., : v.shape[3]]
    out, lse, _ = window_forward(q, k, v, key_range, **options)
    same, _, _ = window_forward(*strided, key_range, **options)
    assert out is not None and same is not None and torch.equal(out, same)
    rows = delta(q, out)
    contiguous = window_backward(q, q, k, v, lse, rows, key_range, **options)
    also = window_backward(strided[0], *strided, lse, rows, key_range, **options)
    for a, b in zip(contiguous[:3], also[:3], strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (1, 0, 0), (1, 3, 0)])
def test_nothing_to_attend(shape: tuple[int, int, int], where: str) -> None:
    B, T, S = shape
    q, k = torch.ones(B, T, 4, 16, device=where), torch.ones(B, S, 2, 16, device=where)
    key_range = causal(T, S, q.device)
    options: dict[str, Any] = {"window_tokens": 5, "scale": 0.2, "softcap": None}
    sinks = torch.linspace(-1, 2, 4, device=where)
    out, lse, gated = window_forward(
        q, k, k, key_range, sinks=sinks, o_sparse=q, gate_logits=q[..., :2], **options
    )
    assert out is not None and gated is not None
    assert out.shape == gated.shape == q.shape
    assert out.eq(0).all() and torch.allclose(lse, sinks.expand(B, T, 4))
    dq, dk, dv, dsinks = window_backward(
        q, q, k, k, lse, torch.zeros_like(lse), key_range, sinks=sinks, **options
    )
    assert dq.shape == q.shape and dk.shape == dv.shape == k.shape
    assert not dq.any() and not dk.any() and not dv.any()
    assert dsinks is not None and not dsinks.any()


@pytest.mark.gpu
def test_the_same_result_every_time() -> None:
    case = Case(tokens=3000, heads=16, kv_heads=4, dim=128, window=128)
    q, k, v = case.inputs(torch.bfloat16, "cuda")
    options: dict[str, Any] = {"window_tokens": 128, "scale": 0.1, "softcap": None}
    options |= {"key_range": case.key_range("cuda"), "sinks": case.sink_values("cuda")}
    gate = torch.rand(q.shape[:3], device="cuda")
    runs = []
    for _ in range(10):
        out, lse, _ = window_forward(q, k, v, **options)
        assert out is not None
        rows = delta(gate[..., None] * q, out)
        runs.append((out, lse, *window_backward(q, q, k, v, lse, rows, gate=gate, **options)))
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.gpu
def test_another_length_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **k: compiled.append(k))
    counts = []
    for tokens in (333, 4097, 1):
        case = Case(tokens=tokens, heads=8, kv_heads=2, dim=128, window=128)
        q, k, v = case.inputs(torch.bfloat16, "cuda")
        options: dict[str, Any] = {"window_tokens": 128, "scale": 0.1, "softcap": None}
        options |= {"key_range": case.key_range("cuda"), "sinks": case.sink_values("cuda")}
        out, lse, _ = window_forward(q, k, v, **options)
        assert out is not None
        window_backward(q, q, k, v, lse, delta(q, out), **options)
        counts.append(len(compiled))
    assert counts[-1] == counts[0]
