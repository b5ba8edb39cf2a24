"""Describes which keys a query may see: causality, padding and packing in one form."""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyRange(NamedTuple):
    """For each query the first and last key slot it may see, and which slots hold a real token.

    A slot is an index into the key tensor. Left padding raises ``first`` for a whole row; packed
    documents raise it at each document's first token. Key blocks are counted from ``first``.
    Slots outside of the key tensor are seen by none: a ``first`` below 0 counts as 0.

    first: (B, T) or (1, T) integers; None where it is 0 throughout.
    last: (B, T) or (1, T) integers; the query's own slot, so that attention is causal.
    mask: (B, S) bool, False for a slot no query may see; None where all are real.
    diagonal: d where query t sees exactly slots 0 .. d + t and the host knows it, so that a kernel
        may rely on it without a wait; else None.
    """

    first: Tensor | None
    last: Tensor
    mask: Tensor | None = None
    diagonal: int | None = None

    def slab(self, begin: int, end: int) -> "KeyRange":
        """The range of queries ``begin`` to ``end``."""
        first = None if self.first is None else self.first[:, begin:end]
        diagonal = None if self.diagonal is None else self.diagonal + begin
        return KeyRange(first, self.last[:, begin:end], self.mask, diagonal)

    def inside(self) -> "KeyRange":
        """The same, with no ``first`` below 0."""
        return self if self.first is None else self._replace(first=self.first.clamp(min=0))

    def shown(self, num_keys: int) -> Tensor:
        """Which slots any query of a row may see, of at least one query: (B or 1, S) bool."""
        slots = torch.arange(num_keys, device=self.last.device)
        seen = slots <= self.last.amax(1, keepdim=True)
        if self.first is not None:
            seen = seen & (slots >= self.first.amin(1, keepdim=True))
        return seen if self.mask is None else seen & self.mask

    def sees(self, slots: Tensor) -> Tensor:
        """Whether each query may see ``slots``: (B, T, ...) int64, in or out of the key tensor.

        Returns: (B, T, ...) bool.
        """
        tail = (1,) * (slots.dim() - 2)
        first = 0 if self.first is None else self.first.view(*self.first.shape, *tail)
        visible = (slots >= first) & (slots <= self.last.view(*self.last.shape, *tail))
        if self.mask is None:
            return visible
        batch = self.mask.shape[0]
        inside = slots.clamp(0, self.mask.shape[1] - 1).expand(batch, *slots.shape[1:])
        real = self.mask.gather(1, inside.flatten(1)).view_as(inside)
        return visible & real


def causal(num_queries: int, num_keys: int, device: torch.device) -> KeyRange:
    """The plain causal range: the queries are the last ``num_queries`` of ``num_keys`` tokens."""
    slots = torch.arange(num_keys - num_queries, num_keys, device=device)
    return KeyRange(None, slots[None], None, num_keys - num_queries)
