"""The kinds of sparse layer, one row each: what one adds, keeps, reads, and how it attends.

A new kind is a function that attends and a row here. Its layout's name goes into ``LayoutName``,
which is what recipes and checkpoints choose from. Imports no torch: plans are made of this.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hysparse_cli.model.gates import GATES, Gate

if TYPE_CHECKING:
    from torch import Tensor

    from hysparse_cli.model.attention import LayerCall
    from hysparse_cli.model.config import HysparseSpec

LayoutName = Literal["hysparse", "hybrid-swa", "full"]
NO_WINDOW_TOKENS = 2  # transformers' smallest window: its cache then holds one token
WITHOUT_WINDOW = "hysparse without window"  # layout hysparse with window_kv none


@dataclass(frozen=True)
class Kind:
    """One kind of sparse layer.

    branches: each is one softmax with a sink bias of its own, a column of ``hysparse.sinks``.
    gate: what weighs two branches; None leaves ``hysparse.gate`` out.
    selects: whether full layers select blocks for it, and serve it their keys and values.
    caches_all: whether its own cache keeps all tokens; else it keeps a window of them,
    cache_window: of so many tokens.
    reach: how many keys each branch sees at most, in the order of ``branches``; None for all.
    attend: its attention, (B, T, H, Dv).
    """

    branches: tuple[str, ...]
    gate: Gate | None
    selects: bool
    caches_all: "Callable[[HysparseSpec], bool]"
    cache_window: "Callable[[HysparseSpec], int]"
    reach: "Callable[[HysparseSpec], tuple[int | None, ...]]"
    attend: "Callable[[LayerCall], Tensor]"


def _attend_both(call: "LayerCall") -> "Tensor":
    """Both branches and their gated sum (eq. 6-9)."""
    return call.gated() if call.is_learned else call.one_softmax()


def _attend_block_sparse(call: "LayerCall") -> "Tensor":
    """The selected blocks only (eq. 6-7)."""
    sinks = call.branch_sinks[:, 0] if call.is_learned else call.sinks
    return call.block_sparse(sinks).out


def _attend_window(call: "LayerCall") -> "Tensor":
    """The window only, over the layer's own keys."""
    return call.window(call.branch_sinks[:, 0]).out


def _attend_full(call: "LayerCall") -> "Tensor":
    """All of the layer's own keys; selects for the layers that it serves."""
    return call.full()


def _reads_any_own(spec: "HysparseSpec") -> bool:
    return spec.sparse_kv == "own"


def _own_window(spec: "HysparseSpec") -> int:
    """Next to none where the layer reads no keys of its own."""
    return spec.window_tokens if spec.window_kv == "own" else NO_WINDOW_TOKENS


FULL = Kind(
    branches=("full",),
    gate=None,
    selects=False,
    caches_all=lambda spec: True,
    cache_window=_own_window,
    reach=lambda spec: (None,),
    attend=_attend_full,
)
KINDS: dict[str, Kind] = {
    "hysparse": Kind(
        branches=("block-sparse", "window"),
        gate=GATES["sigmoid"],
        selects=True,
        caches_all=_reads_any_own,
        cache_window=_own_window,
        reach=lambda spec: (spec.top_k_tokens, spec.window_tokens),
        attend=_attend_both,
    ),
    WITHOUT_WINDOW: Kind(
        branches=("block-sparse",),
        gate=None,
        selects=True,
        caches_all=_reads_any_own,
        cache_window=_own_window,
        reach=lambda spec: (spec.top_k_tokens,),
        attend=_attend_block_sparse,
    ),
    "hybrid-swa": Kind(
        branches=("window",),
        gate=None,
        selects=False,
        caches_all=_reads_any_own,
        cache_window=_own_window,
        reach=lambda spec: (spec.window_tokens,),
        attend=_attend_window,
    ),
    "full": FULL,
}
