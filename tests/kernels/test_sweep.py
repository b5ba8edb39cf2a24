"""Random calls of every op: the reference against loops over numbers, every backend against it.

Shapes and layouts, key ranges in and out of the keys, masks, empties, NaN where no query sees.
"""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hysparse_kernels import backends
from tests.kernels.brute_force import softmax_over, weighted
from tests.kernels.calls import OPS, Sizes, arguments, run
from tests.kernels.tolerance import assert_within_tolerance
from tests.kernels.triton.test_arguments import LAYOUTS, expanded

# The interpreter's NumPy warns of NaN that a kernel reads and then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
CASES, CASES_IN_THE_INTERPRETER = 600, 60
BLOCK, WINDOW = 16, 7


@dataclass
class Call:
    """One random call; ``tensors`` by argument, as in ``calls``."""

    op: str
    sizes: Sizes
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    @classmethod
    def drawn(cls, seed: int, where: str = "cpu") -> "Call":
        chance = random.Random(seed)
        torch.manual_seed(seed)
        S = chance.choice([0, 1, 7, 16, 17, 33, 40])
        sizes = Sizes(
            B=chance.choice([0, 1, 1, 2, 2, 3]),
            T=chance.choice([0, 1, 1, 2, 3, 5]),
            S=S,
            H=(G := chance.choice([1, 2])) * chance.choice([1, 2, 3]),
            G=G,
            D=chance.choice([16, 20, 32]),
            K=chance.choice([0, 1, 2, 5]),
            ranges=chance.random() < 0.8,
        )
        op = OPS[seed % len(OPS)]
        tensors = arguments(op, Sizes(**{**vars(sizes), "K": 1}), "cpu")
        for name, x in tensors.items():
            tensors[name] = _drawn(name.split(".")[-1], x, sizes, chance)
        for name in list(tensors):
            if name.endswith((".first", ".mask")) and chance.random() < 0.4:
                del tensors[name]
        if "sinks" in tensors and chance.random() < 0.5:
            del tensors["sinks"]
        options: dict[str, Any] = {}
        if op != "gated_sum":
            options = {
                "scale": chance.choice([None, None, 0.0, -0.3, 2.0]),
                "softcap": chance.choice([None, None, 1.5]),
            }
        if op in ("sliding_window_attention", "sparse_layer_attention"):
            options["window_tokens"] = WINDOW
        laid_out = {n: _anyhow(x, chance) for n, x in tensors.items()}
        return cls(op, sizes, {n: x.to(where) for n, x in laid_out.items()}, options)

    def keys(self, b: int, t: int, name: str) -> list[int]:
        """What a query sees, by its key range."""
        last, first, mask = self._range(name)
        low, high = max(0, int(first[b, t])), min(self.sizes.S - 1, int(last[b, t]))
        return [i for i in range(low, high + 1) if mask[b, i]]

    def _range(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        B, T, S = self.sizes.of("BTS")
        causal = torch.arange(S - T, S).expand(B, T)
        last = self.tensors.get(f"{name}.last", causal).cpu()
        first = self.tensors.get(f"{name}.first", torch.zeros(B, T)).cpu()
        return last, first, self.tensors.get(f"{name}.mask", torch.ones(B, S).bool()).cpu()

    def branches(self) -> list[tuple[str, str, str, int]]:
        """Keys, values and key range of each branch, and its column of sinks."""
        if self.op == "sparse_layer_attention":
            return [
                ("shared_k", "shared_v", "key_range", 0),
                ("window_k", "window_v", "window_range", 1),
            ]
        return [("k", "v", "key_range", 1 if self.op == "sliding_window_attention" else 0)]

    def seen(self, b: int, t: int, g: int, name: str, column: int) -> list[int]:
        """What a query's heads attend to in a branch."""
        keys = self.keys(b, t, name)
        last, first, _ = self._range(name)
        if column == 1:
            return [i for i in keys if i > int(last[b, t]) - WINDOW]
        if self.op == "full_attention":
            return keys
        listed = set(self.tensors["block_idx"][b, t, g].tolist())
        return [i for i in keys if (i - max(0, int(first[b, t]))) // BLOCK in listed]

    def poisoned(self) -> dict[str, Tensor]:
        """NaN in the slots that a mask hides."""
        tensors = dict(self.tensors)
        for k, v, name, _ in self.branches() if self.op != "gated_sum" else ():
            mask = tensors.get(f"{name}.mask")
            if mask is not None:
                for x in (k, v):
                    tensors[x] = tensors[x].masked_fill(~mask[..., None, None], torch.nan)
        return tensors

    def by_loops(self) -> Tensor:
        x = {
            n: y.double().cpu() if y.is_floating_point() else y.cpu()
            for n, y in self.tensors.items()
        }
        if self.op == "gated_sum":
            gates = 1 / (1 + (-x["gate_logits"]).exp())
            return gates[..., :1] * x["o_sparse"] + gates[..., 1:] * x["o_window"]
        out = torch.zeros(self.sizes.of("BTHD"), dtype=torch.float64)
        group = self.sizes.H // self.sizes.G
        scale = self.options["scale"]
        scale = self.sizes.D**-0.5 if scale is None else scale
        for b, t, h in torch.cartesian_prod(
            *(torch.arange(n) for n in self.sizes.of("BTH"))
        ).tolist():
            g = h // group
            for k, v, name, column in self.branches():
                seen = self.seen(b, t, g, name, column)
                sink = None
                if "sinks" in x:
                    of_head = x["sinks"][h]
                    sink = float(of_head if of_head.dim() == 0 else of_head[column])
                p = softmax_over(
                    x["q"][b, t, h], x[k][b, :, g], seen, scale, sink, self.options["softcap"]
                )
                gate = 1.0
                if self.op == "sparse_layer_attention":
                    gate = float(x["gate_logits"][b, t, h, column].sigmoid())
                out[b, t, h] += gate * weighted(x[v][b, :, g], p)
        return out


def _drawn(field: str, x: Tensor, sizes: Sizes, chance: random.Random) -> Tensor:
    if field == "mask":
        return torch.rand(x.shape) < chance.choice([0.0, 0.5, 0.9])
    if field == "last":
        how = chance.choice(["causal", "beyond", "anywhere", "short"])
        if how == "anywhere":
            return torch.randint(-3, sizes.S + 4, x.shape)
        return x + {"causal": 0, "beyond": 3, "short": -4}[how]
    if field == "first":
        return torch.randint(-4, sizes.S + 2, x.shape)
    if field == "block_idx":
        blocks = range(-2, -(-sizes.S // BLOCK) + 3)
        kept = min(sizes.K, len(blocks))
        lists = [chance.sample(blocks, kept) for _ in range(x.shape[:-1].numel())]
        made = torch.tensor(lists).reshape(*x.shape[:-1], kept)
        return made.to(chance.choice([torch.int32, torch.int64]))
    if field == "sinks" and chance.random() < 0.2:
        return torch.full_like(x, -torch.inf)
    return torch.randn(x.shape)


def _anyhow(x: Tensor, chance: random.Random) -> Tensor:
    if not x.numel() or chance.random() < 0.3:
        return x
    return chance.choice([layout for layout in LAYOUTS if layout is not expanded])(x)


@pytest.mark.long
@pytest.mark.parametrize("seeds", range(0, CASES, 50))
def test_the_reference_against_loops(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    for seed in range(seeds, seeds + 50):
        call = Call.drawn(seed)
        wide = {n: x.double() if x.is_floating_point() else x for n, x in call.poisoned().items()}
        out = run(call.op, wide, None, **call.options)["out"]
        torch.testing.assert_close(out, call.by_loops(), rtol=0, atol=1e-11, msg=f"seed {seed}")


@pytest.mark.parametrize(
    "where",
    [pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("seeds", range(0, CASES_IN_THE_INTERPRETER, 10))
def test_every_backend_against_the_reference(
    seeds: int, where: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(seeds, seeds + 10):
        call = Call.drawn(seed, where)
        clean = call.tensors
        d_out = torch.randn(call.sizes.of("BTHD")).to(where) if seed % 2 else None
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, backend)
        ours = run(call.op, call.poisoned(), d_out, **call.options)
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
        wide = {n: x.double() if x.is_floating_point() else x for n, x in clean.items()}
        truth = run(call.op, wide, None if d_out is None else d_out.double(), **call.options)
        plain = run(call.op, clean, d_out, **call.options)
        for name, x in ours.items():
            if name == "block_idx":
                continue
            what = f"seed {seed}, {name}"
            assert torch.equal(x.isneginf(), truth[name].isneginf()), what
            finite = (y.masked_fill(y.isneginf(), 0) for y in (x, plain[name], truth[name]))
            assert_within_tolerance(*finite, gradient=name.startswith("d "), name=what)
