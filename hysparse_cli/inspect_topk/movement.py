"""How a layer's selection moves: what the next tokens keep of it, and how far back it reaches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hysparse_cli.inspect_topk.blocks import Sizes

LAGS = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Movement:
    """One KV head's selection, over the queries that see more blocks than are kept.

    kept: for each of LAGS, the part of a token's blocks that the token so many before had selected
    too; None where no token has one so far before it. kept_random: of as many random blocks.
    distances: what part of the selected blocks is so many blocks before the query's own: 0, 1, 2-3,
    4-7 and so on, up to the longest there is. distances_random: of random blocks.
    """

    kept: list[float | None]
    kept_random: list[float | None]
    distances: list[float]
    distances_random: list[float]


def movements(selection: Tensor, sizes: Sizes) -> list[Movement] | None:
    """One for each KV head; None where no query chooses.

    Args:
        selection: (T, G, K) block indices, -1 pads.
    """
    first = sizes.first_choice
    chosen = selection[first:]
    if not len(chosen):
        return None
    kept = [_kept(chosen, lag) for lag in LAGS]
    own = torch.arange(first, len(selection), device=selection.device) // sizes.block_size
    seen = own + 1
    chance = [
        float((sizes.top_k_blocks / seen[lag:]).mean()) if lag < len(seen) else None for lag in LAGS
    ]
    bins = _bin(own.max()[None]).item() + 1
    distances = _histogram(_bin(own[:, None, None] - chosen), int(bins))
    blocks = torch.arange(int(seen.max()), device=selection.device)
    back = own[:, None] - blocks
    weight = torch.where(back >= 0, 1 / seen[:, None], 0.0)
    by_bin = weight.new_zeros(int(bins)).index_add_(
        0, _bin(back.clamp(min=0)).flatten(), weight.flatten()
    )
    random = (by_bin / by_bin.sum()).tolist()
    return [
        Movement([part[head] if part else None for part in kept], chance, shares, random)
        for head, shares in enumerate(distances)
    ]


def _kept(chosen: Tensor, lag: int) -> list[float] | None:
    if lag >= len(chosen):
        return None
    now, before = chosen[lag:, :, :, None], chosen[:-lag, :, None]
    shares: list[float] = (now == before).any(-1).float().mean((0, 2)).tolist()
    return shares


def _bin(distance: Tensor) -> Tensor:
    """0, 1, 2-3, 4-7, ... as 0, 1, 2, 3, ..."""
    return torch.where(distance > 0, distance.clamp(min=1).double().log2().floor() + 1, 0).long()


def _histogram(bins_TGK: Tensor, bins: int) -> list[list[float]]:
    """Each head's share of every bin."""
    by_head = bins_TGK.transpose(0, 1).flatten(1)
    counts = torch.stack([head.bincount(minlength=bins) for head in by_head]).float()
    shares: list[list[float]] = (counts / counts.sum(1, keepdim=True)).tolist()
    return shares
