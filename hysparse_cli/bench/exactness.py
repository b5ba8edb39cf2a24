"""Checks that the attention that is timed is right: its last queries against float64.

Of each measurement the first full and the first sparse layer are held to the reference, on the
queries, keys and lists that were timed. Gradients are not looked at: ``make bench-kernels`` does
that.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.bench.selection import scores_of, shortfall
from hysparse_cli.model.attention import LayerCall
from hysparse_cli.model.state import ForwardState, Shared
from hysparse_kernels import FullAttention, causal, full_attention
from hysparse_kernels.backends import run_by

CHECKED_QUERIES = 16
LEAST_ALLOWED = 1e-5  # of sums in float32, however fine the dtype
WRONG = "wrong"


class AttentionCheck:
    """Remembers what the first full and the first sparse attention layer were given, and gave."""

    def __init__(self) -> None:
        self._seen: dict[str, _Layer] = {}

    def see(self, call: LayerCall, out: Tensor, *, selected: bool) -> None:
        """Remember ``call``, if it is of a layer that is looked at: the latest counts.

        Args:
            out: (B, T, H, Dv), what it gave. selected: whether the lists in use are those that full
                layers select.
        """
        kind = "full" if call.branches is None else "sparse"
        if kind not in self._seen or self._seen[kind].call.layer == call.layer:
            self._seen[kind] = _Layer(call, out, selected)

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

    def __init__(self, call: LayerCall, out: Tensor, selected: bool):
        begin, end = max(0, call.q.shape[1] - CHECKED_QUERIES), call.q.shape[1]
        self.out, self.queries = out.detach()[:1, begin:].clone(), slice(begin, end)
        k, v = call.k.detach()[:1], call.v.detach()[:1]
        self.call = call.replace(q=call.q.detach()[:1, begin:].clone(), k=k, v=v)
        self.shared: Shared | None = None  # what it reads, of a server
        self.chosen: Tensor | None = None  # (1, t, G, K), what it selects for others
        if call.block_idx is None:
            return
        k, v, block_idx = (x.detach()[:1] for x in call.shared)
        block_idx = block_idx[:, begin:].clone()
        if call.branches is not None:
            self.shared = Shared(k, v, block_idx)
        elif selected:
            self.chosen = block_idx

    def error(self) -> float:
        truth = self._truth()
        return float((self.out.double() - truth).norm() / truth.norm())

    def selection_error(self, chosen: Tensor) -> float:
        """Args: chosen: (1, t, G, K)."""
        assert self.call.state is not None
        scores = self._attend_in_full(self.call.state.spec.block_size).block_scores
        assert scores is not None
        best = scores.topk(min(chosen.shape[-1], scores.shape[-1])).values
        return shortfall(scores_of(chosen, scores)[..., : best.shape[-1]], best)

    def _truth(self) -> Tensor:
        call, state = self.call, self._state()
        if call.branches is None:
            return self._attend_in_full(None).out
        assert state is not None, "a sparse layer's"
        gate_logits, sinks = call.branches
        if gate_logits is not None:
            gate_logits = gate_logits.detach()[:1, self.queries].double()
        if self.shared is not None:
            k, v, block_idx = self.shared
            server = state.spec.layers.server_of(call.layer)
            state.publish(server, Shared(k.double(), v.double(), block_idx))
        with run_by("reference"):
            return call.replace(
                q=call.q.double(),
                k=call.k.double(),
                v=call.v.double(),
                state=state,
                branches=(gate_logits, sinks.double()),
            ).attend()

    def _state(self) -> ForwardState | None:
        """Of a forward over the queries that are looked at, with nothing published in it yet."""
        state, queries = self.call.state, self.queries
        if state is None:
            return None
        whole, window = (
            key_range.slab(queries.start, queries.stop)
            for key_range in (state.key_range, state.window_range)
        )
        return ForwardState(state.spec, state.num_keys, whole, window)

    def _attend_in_full(self, block_size: int | None) -> FullAttention:
        call, state = self.call, self._state()
        seen = causal(call.q.shape[1], call.k.shape[1], call.q.device)
        if state is not None:
            seen = state.key_range
        with run_by("reference"):
            return full_attention(
                call.q.double(),
                call.k.double(),
                call.v.double(),
                key_range=seen,
                scale=call.scale,
                softcap=call.softcap,
                sinks=None if call.sinks is None else call.sinks.double(),
                block_size=block_size,
                return_block_scores=block_size is not None,
            )
