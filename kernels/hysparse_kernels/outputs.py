"""Names what the attention ops return."""

from typing import NamedTuple

from torch import Tensor


class Attention(NamedTuple):
    """out: (B, T, H, D) in q's dtype; a row that sees no key is zero.

    lse: (B, T, H) float32 or float64, the log of the softmax denominator, sink included; -inf where
    a row sees nothing. No gradient flows through it.
    """

    out: Tensor
    lse: Tensor


class FullAttention(NamedTuple):
    """out and lse as in ``Attention``.

    block_idx: (B, T, G, K) int32, the selected key blocks in ascending order, -1 pads; or None.
    block_scores: (B, T, G, N), eq. 3 after the group-wise maximum, 0 where unseen; or None.
    """

    out: Tensor
    lse: Tensor
    block_idx: Tensor | None
    block_scores: Tensor | None
