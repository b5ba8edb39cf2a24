"""Whether the attention that is timed is right: its last queries against float64.

Of each measurement the first full and the first sparse layer are held to the reference, on the
queries, keys and lists that were timed. Gradients are not looked at: ``make bench-kernels`` does
that.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hysparse_cli.bench.selection import scores_of, shortfall
from hysparse_cli.model.attention import hysparse_attention
from hysparse_cli.model.state import ForwardState, Shared
from hysparse_kernels import FullAttention, causal, full_attention
from hysparse_kernels.backends import run_by

CHECKED_QUERIES = 16
LEAST_ALLOWED = 1e-5  # of sums in float32, however fine the dtype
WRONG = "wrong"


class AttentionCall(NamedTuple):
    """One call of a transformers attention function.

    q, k, v: (B, heads, tokens, D). options: the function's others. out: (B, T, H, Dv), the result.
    selected: whether the lists in use are those that full layers select.
    """

    module: Any
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    out: Tensor
    selected: bool


class AttentionCheck:
    """Remembers what the first full and the first sparse attention layer were given, and gave."""

    def __init__(self) -> None:
        self._seen: dict[str, _Layer] = {}

    def see(self, call: AttentionCall) -> None:
        """Remember ``call``, if it is of a layer that is looked at: the latest counts."""
        kind = "full" if call.options.get("branches") is None else "sparse"
        if kind not in self._seen or self._seen[kind].index == call.module.layer_idx:
            self._seen[kind] = _Layer(call)

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """``full_attention_error``, ``sparse_attention_error``: norm of the error over norm of the
        truth; and ``selection_error``: the largest part by which a selected block's score is below
        that of the block of the same rank. Each where there was such a layer."""
        found = {f"{kind}_attention_error": seen.error() for kind, seen in self._seen.items()}
        if "full" in self._seen and (chosen := self._seen["full"].chosen) is not None:
            found["selection_error"] = self._seen["full"].selection_error(chosen)
        return found


def errors_in(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Those of a measurement's numbers that are errors."""
    return {name: value for name, value in numbers.items() if is_error(name)}


def is_error(name: str) -> bool:
    """Whether a number of this name is one of ``AttentionCheck.errors``."""
    return name.endswith("_error")


def wrong(numbers: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    """Which errors among ``numbers`` are above ``dtype``'s eps; None where none is.

    Rounding the inputs and the result comes to about a quarter of it.
    """
    most = max(torch.finfo(dtype).eps, LEAST_ALLOWED)
    off = [f"{name} {error:.1e}" for name, error in errors_in(numbers).items() if not error <= most]
    return f"{WRONG}: {', '.join(off)}; {most:.1e} would be rounding" if off else None


class _Layer:
    """One layer's attention of the first sequence's last queries."""

    def __init__(self, call: AttentionCall):
        self.module, self.index = call.module, call.module.layer_idx
        self.begin, self.end = max(0, call.q.shape[2] - CHECKED_QUERIES), call.q.shape[2]
        self.q = call.q.detach()[:1, :, self.begin :].clone()
        self.out = call.out.detach()[:1, self.begin :].clone()
        self.k, self.v = call.k.detach()[:1], call.v.detach()[:1]
        self.options = dict(call.options)
        self.state: ForwardState | None = self.options.pop("hysparse", None)
        self.branches = self.options.pop("branches", None)
        self.shared: Shared | None = None
        self.chosen: Tensor | None = None
        if self.state is None or not self.state.spec.selects:
            return
        layers = self.state.spec.layers
        if self.branches is not None:
            self.shared = self._of_queries(self.state.shared_by(layers.server_of(self.index)))
        elif call.selected and layers.serves(self.index):
            self.chosen = self._of_queries(self.state.shared_by(self.index)).block_idx

    def _of_queries(self, shared: Shared) -> Shared:
        k, v, block_idx = (x.detach()[:1] for x in shared)
        return Shared(k, v, block_idx[:, self.begin :].clone())

    def error(self) -> float:
        truth = self._truth()
        return float((self.out.double() - truth).norm() / truth.norm())

    def selection_error(self, chosen: Tensor) -> float:
        """Args: chosen: (1, t, G, K)."""
        assert self.state is not None
        scores = self._attend_in_full(self.state.spec.block_size).block_scores
        assert scores is not None
        best = scores.topk(min(chosen.shape[-1], scores.shape[-1])).values
        return shortfall(scores_of(chosen, scores)[..., : best.shape[-1]], best)

    def _truth(self) -> Tensor:
        if self.branches is None:
            return self._attend_in_full(None).out
        assert self.state is not None
        gates, sinks = self.branches
        if gates is not None:
            gates = gates.detach()[:1, self.begin :].double()
        state = self._state()
        if self.shared is not None:
            k, v, block_idx = self.shared
            server = state.spec.layers.server_of(self.index)
            state.publish(server, Shared(k.double(), v.double(), block_idx))
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        more = {"hysparse": state, "branches": (gates, sinks.double()), **self.options}
        with run_by("reference"):
            out: Tensor = hysparse_attention(self.module, q, k, v, None, **more)[0]
        return out

    def _state(self) -> ForwardState:
        assert self.state is not None
        whole, window = self.state.key_range, self.state.window_range
        mine = whole.slab(self.begin, self.end), window.slab(self.begin, self.end)
        return ForwardState(self.state.spec, self.state.num_keys, *mine)

    def _attend_in_full(self, block_size: int | None) -> FullAttention:
        q, k, v = (x.double().transpose(1, 2) for x in (self.q, self.k, self.v))
        seen = causal(q.shape[1], k.shape[1], q.device)
        if self.state is not None:
            seen = self._state().key_range
        sinks = self.options.get("s_aux")
        with run_by("reference"):
            return full_attention(
                q,
                k,
                v,
                key_range=seen,
                scale=self.options.get("scaling"),
                softcap=self.options.get("softcap"),
                sinks=None if sinks is None else sinks.double(),
                block_size=block_size,
                return_block_scores=block_size is not None,
            )
