"""Block-sparse attention, backward: what the kernels need, and their launches."""

from typing import Any

import torch
import triton
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import describe, last_contiguous, strides_of
from hysparse_kernels.triton.sparse.forward import configuration, split_of
from hysparse_kernels.triton.sparse.key_gradients import differentiate_keys
from hysparse_kernels.triton.sparse.pairs import Pairs, pairs_of
from hysparse_kernels.triton.sparse.query_gradients import differentiate_pairs, differentiate_tiles
from hysparse_kernels.triton.sparse.query_tiles import QueryTiles, query_tiles

WORKSPACE = 512 << 20  # bytes of partial dQ at a time
PROGRAMS = 8192  # that share the items of a pass


def sparse_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    lse: Tensor,
    delta: Tensor,
    key_range: KeyRange,
    *,
    block_size: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of ``sparse_forward``.

    dK and dV are added up in float32 in no fixed order.

    Args:
        d_out: (B, T, H, Dv). q, k, v, block_idx, key_range and options as in ``sparse_forward``.
        lse: (B, T, H) float32, of the forward.
        delta: (B, T, H) float32, the sum of gate * d_out * out over Dv.
        gate: (B, T, H) float32, what d_out is to be multiplied by; None for 1.
    Returns: dq, dk, dv in the dtypes of q, k, v; dsinks (H,) float32, None without sinks.
    """
    B, T, H, D = q.shape
    S, G, Dv = v.shape[1:]
    d_sinks = None
    if sinks is not None:
        # A sink of -inf, whose rows may see nothing, has no weight.
        weights = torch.exp(sinks.float() - lse.masked_fill(lse.isneginf(), torch.inf))
        d_sinks = -(weights * delta).sum((0, 1))
    if not q.numel() or not k.numel() or not block_idx.numel():
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), d_sinks
    padded_d, padded_dv = triton.next_power_of_2(D), triton.next_power_of_2(Dv)
    keys, _, _ = configuration(q.dtype, block_size, padded_d + padded_dv)
    tiles = query_tiles(
        block_idx,
        key_range,
        block_size=block_size,
        num_keys=S,
        group=H // G,
        with_rare=q.dtype != torch.float32,
    )
    q = last_contiguous(q)
    d_out = last_contiguous(d_out)
    last, mask = key_range.last, key_range.mask
    shared = (
        q,
        *q.stride()[:3],
        describe(k, keys, padded_d),
        describe(v, keys, padded_dv),
        d_out,
        *d_out.stride()[:3],
        lse.contiguous(),
        delta.contiguous(),
        gate.contiguous() if gate is not None else None,
        last,
        *strides_of(last),
        mask,
        *strides_of(mask),
    )
    sizes = {
        "GROUP": H // G,
        "BLOCK": block_size,
        "KEYS": keys,
        "D": D,
        "DV": Dv,
        "PADDED_D": padded_d,
        "PADDED_DV": padded_dv,
    }
    options = scale, softcap, T, S, G

    def listed(at_once: int | None) -> Pairs:
        return pairs_of(
            tiles,
            num_queries=T,
            num_keys=S,
            block_size=block_size,
            aligned=key_range.first is None,
            at_once=at_once,
        )

    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    dq = q.new_empty(B, T, H, D)
    _launch_keys(shared, dk, dv, listed(None), options, sizes)
    rare = None
    if q.dtype != torch.float32:
        room = WORKSPACE // (H // G * (block_size // keys) * D * q.element_size())
        rare = listed(max(1, room - tiles.starts.shape[3]))
    _launch_queries(shared, dq, tiles, rare, options, sizes)
    return dq, dk.to(k.dtype), dv.to(v.dtype), d_sinks


def _launch_keys(
    shared: tuple[Any, ...],
    dk: Tensor,
    dv: Tensor,
    pairs: Pairs,
    options: tuple[Any, ...],
    sizes: dict[str, int],
) -> None:
    """Add to dk and dv (B, S, G, D), float32."""
    rows, num_warps, num_stages = _configuration_of_pairs(shared[0].dtype, sizes)
    heads = triton.next_power_of_2(sizes["GROUP"])
    differentiate_keys[(pairs.item_bins.shape[0] * (sizes["BLOCK"] // sizes["KEYS"]),)](
        *shared,
        dk,
        dv,
        pairs.queries,
        pairs.ends,
        pairs.item_ends,
        pairs.item_bins,
        pairs.item_begins,
        *options,
        dk.shape[0] * dk.shape[2],
        pairs.bins,
        SLOTS_PER_BIN=pairs.slots_per_bin,
        HEADS=heads,
        QUERIES=max(1, rows // heads),
        ITEM=pairs.item,
        STAGES=num_stages,
        **sizes,
        num_warps=num_warps,
    )


def _launch_queries(
    shared: tuple[Any, ...],
    dq: Tensor,
    tiles: QueryTiles,
    rare: Pairs | None,
    options: tuple[Any, ...],
    sizes: dict[str, int],
) -> None:
    """Write dq: in each pass the parts of rare blocks, then the tiles that add them up."""
    rows, pair_warps, pair_stages = _configuration_of_pairs(dq.dtype, sizes)
    wide = dq.dtype == torch.float32 or sizes["PADDED_D"] + sizes["PADDED_DV"] > 256
    heads = triton.next_power_of_2(sizes["GROUP"])
    parts = sizes["BLOCK"] // sizes["KEYS"]
    split = split_of(tiles.queries, sizes["GROUP"], dq.dtype)
    of_rare: tuple[Tensor | None, ...] = (None,) * 4
    if rare is not None:
        room = rare.at_once + tiles.starts.shape[3]
        if rare.passes == 1:
            room = min(room, rare.queries.shape[0])
        d_part = dq.new_empty(room * sizes["GROUP"] * parts, sizes["D"])
        of_rare = rare.tile_ends, rare.query_begins, rare.query_counts, d_part
    for turn in range(rare.passes if rare is not None else 1):
        if rare is not None:
            programs = min(PROGRAMS, rare.item_bins.shape[0])
            differentiate_pairs[(programs * parts,)](
                *shared,
                d_part,
                rare.queries,
                rare.places,
                rare.ends,
                rare.item_ends,
                rare.item_bins,
                rare.item_begins,
                *options,
                tiles.counts.shape[0] * tiles.counts.shape[1],
                rare.bins,
                turn,
                programs,
                SLOTS_PER_BIN=rare.slots_per_bin,
                HEADS=heads,
                QUERIES=max(1, rows // heads),
                ITEM=rare.item,
                STAGES=pair_stages,
                **sizes,
                num_warps=pair_warps,
            )
        differentiate_tiles[(tiles.counts.numel() * split,)](
            *shared,
            dq,
            tiles.starts,
            tiles.members,
            tiles.counts,
            tiles.pairs,
            *of_rare,
            *options,
            turn,
            rare.at_once if rare is not None else 1,
            CAPACITY=tiles.starts.shape[3],
            QUERIES=tiles.queries,
            SPLIT=split,
            HEADS=max(heads, 16 * split // tiles.queries),
            STAGES=1 if wide else 2,
            **sizes,
            num_warps=8,
        )


def _configuration_of_pairs(dtype: torch.dtype, sizes: dict[str, int]) -> tuple[int, int, int]:
    """Rows of a step, warps, and pipeline stages."""
    if dtype == torch.float32 or sizes["PADDED_D"] + sizes["PADDED_DV"] > 256:
        return 32, 8, 1
    return 64, 4, 2
