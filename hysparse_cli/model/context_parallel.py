"""Attention over rows whose tokens are split over processes (DeepSpeed-Ulysses, arXiv 2309.14509).

Outside attention a process has its share of each row's tokens, with all heads. For attention an
all-to-all gives it all tokens of its share of the heads, and a second one takes the output back.
Selection is per KV head, so that a full layer's lists, and the keys and values it serves, stay
where they are: what HySparse's attention does with whole rows it does here with fewer heads.

Shape suffixes: B rows, T tokens of a row, t those of a process, H heads of any kind, h those of a
process, D head dim.
"""

from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from hysparse_cli.model.attention import dense_attention, hysparse_attention
from hysparse_cli.model.state import ForwardOptions, ForwardState, document_starts
from hysparse_kernels import KeyRange, causal

SPLIT = "hysparse_split"


class SplitRows:
    """Rows of packed documents, each split over ``processes``: the first T / P tokens and so on.

    Args:
        position_ids: (B, T) of the whole rows, the same in each process; T a multiple of P.
        processes: None is this one alone.
    """

    def __init__(self, position_ids: Tensor, processes: dist.ProcessGroup | None):
        self.position_ids, self.processes = position_ids, processes
        self.rank, self.num_shares = 0, 1
        if processes is not None:
            self.rank, self.num_shares = processes.rank(), processes.size()

    @cached_property
    def key_range(self) -> KeyRange:
        """The keys that each query of the whole rows sees."""
        length = self.position_ids.shape[1]
        every = causal(length, length, self.position_ids.device)
        first = document_starts(self.position_ids)
        return every if first is None else KeyRange(first, every.last)

    def share(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part of ``whole`` along ``dim``: of its tokens, or of its heads."""
        return whole.chunk(self.num_shares, dim)[self.rank]

    def total(self, partial: Tensor) -> Tensor:
        """The sum over the processes of what each found in its tokens; no gradient goes through."""
        if self.processes is None:
            return partial
        summed = partial.detach().clone()
        dist.all_reduce(summed, group=self.processes)
        return summed

    def exchange(self, x: Tensor, *, split: int, join: int) -> Tensor:
        """Give each process a part of dimension ``split``, and get all parts of ``join`` for it."""
        if self.processes is None:
            return x
        parts = torch.stack(x.chunk(self.num_shares, split))
        received: Tensor = _AllToAll.apply(parts, self.processes)  # type: ignore[no-untyped-call]
        return received.movedim(0, join).flatten(join, join + 1)


class _AllToAll(torch.autograd.Function):
    """Part p of dimension 0 goes to process p, whose own part comes to p's place."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, processes: dist.ProcessGroup) -> Tensor:
        ctx.processes = processes
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=processes)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        returned = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(returned, gradient.contiguous(), group=ctx.processes)
        return returned, None


def split_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    hysparse: ForwardState | ForwardOptions,
    s_aux: Tensor | None = None,
    branches: tuple[Tensor | None, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for models, dense or HySparse, that see split rows.

    It has no mask function of its own, so that transformers makes no mask: which keys a query sees
    is in the options' rows, or in a HySparse forward's state, which is of the whole rows.

    Args:
        query: (B, H, t, D), rotated by its place in the whole row; key, value: likewise.
        hysparse: a HySparse forward's state, or a dense one's options, with the rows.
        s_aux, branches, kwargs: as for ``hysparse_attention``, of all heads and the process's
            tokens.
    Returns: (B, t, H, Dv), and no attention weights.
    """
    options = hysparse.options if isinstance(hysparse, ForwardState) else hysparse
    rows, dtype = options.rows, value.dtype
    assert rows is not None, "part.py gives them"
    q, k, v = (rows.exchange(x.to(dtype), split=1, join=2) for x in (query, key, value))
    sinks = None if s_aux is None else rows.share(s_aux, 0)
    common: dict[str, Any] = {"s_aux": sinks, **kwargs}
    if isinstance(hysparse, ForwardOptions):
        assert not kwargs.get("dropout"), "refused before"
        out, _ = dense_attention(module, q, k, v, None, hysparse=hysparse, **common)
    else:
        if branches is not None:
            gate_logits, own = branches
            if gate_logits is not None:
                gate_logits = rows.exchange(gate_logits, split=2, join=1)
            branches = gate_logits, rows.share(own, 0)
        out, _ = hysparse_attention(
            module, q, k, v, None, hysparse=hysparse, branches=branches, **common
        )
    return rows.exchange(out, split=1, join=2), None


AttentionInterface.register(SPLIT, split_attention)
