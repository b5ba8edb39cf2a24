"""Full attention with the selection of key blocks (HySparse Algorithm 1), slab by slab.

The block maxima of all queries would be T * S / block_size numbers a query head, so queries go
through in slabs that share one workspace.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.triton.arguments import shown
from hysparse_kernels.triton.full import forward_hopper as hopper
from hysparse_kernels.triton.full.decode import full_decode
from hysparse_kernels.triton.full.forward import full_forward
from hysparse_kernels.triton.full.top_k import Maxima, select
from hysparse_kernels.triton.tiles import DECODE_ROWS

WORKSPACE_BYTES = 512 << 20
SLAB_STEP = 128


def attend_and_select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    block_size: int | None,
    top_k_blocks: int,
    return_block_scores: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """out, lse, block_idx and block_scores, as ``hysparse_kernels.full_attention`` has them."""
    B, T, H, _ = q.shape
    S, G, Dv = v.shape[1:]
    if T * (H // G) <= DECODE_ROWS:
        return full_decode(
            q,
            k,
            v,
            key_range,
            scale=scale,
            sinks=sinks,
            softcap=softcap,
            block_size=block_size,
            top_k_blocks=top_k_blocks,
            return_block_scores=return_block_scores,
        )
    k, v = shown(k, v, key_range)
    out = q.new_empty(B, T, H, Dv)
    lse = q.new_empty(B, T, H, dtype=torch.float32)
    on_hopper = hopper.takes(q, k, v, key_range, scale=scale, softcap=softcap)
    forward = hopper.full_forward if on_hopper else full_forward
    options: dict[str, Any] = {"scale": scale, "sinks": sinks, "softcap": softcap}
    if block_size is None or not (top_k_blocks or return_block_scores):
        forward(q, k, v, key_range, out, lse, None, block_size=SLAB_STEP, **options)
        return out, lse, None, None

    num_blocks = -(-S // block_size)
    block_idx = q.new_empty(B, T, G, max(1, top_k_blocks), dtype=torch.int32)
    scores = q.new_empty(B, T, G, num_blocks, dtype=torch.float32) if return_block_scores else None
    known = S if scores is not None or key_range.diagonal is None else key_range.diagonal
    slabs = _slabs(T, known, S, block_size, B * H, _processors(q.device))
    sizes = [B * H * blocks * (end - begin) for begin, end, blocks in slabs]
    workspace = q.new_empty(max(sizes, default=0), dtype=torch.float32)
    maxima = Maxima(workspace, torch.empty_like(lse), torch.empty_like(lse))
    for (begin, end, blocks), size in zip(slabs, sizes, strict=True):
        part = slice(begin, end)
        of_part = maxima.slab(begin, end, workspace[:size].view(B, H, blocks, end - begin))
        seen = key_range.slab(begin, end)
        forward(
            *(q[:, part], k, v, seen, out[:, part], lse[:, part], of_part),
            block_size=block_size,
            **options,
        )
        part_scores = None if scores is None else scores[:, part]
        select(of_part, seen, block_idx[:, part], part_scores, block_size=block_size)
    return out, lse, block_idx if top_k_blocks else None, scores


def _slabs(
    num_queries: int,
    diagonal: int,
    num_keys: int,
    block_size: int,
    num_heads: int,
    processors: int,
) -> list[tuple[int, int, int]]:
    """Slabs of queries, as (begin, end, key blocks they may see), whose maxima fit the workspace.

    A slab of n queries from t sees diagonal + t + n keys at most, so early slabs are longer.
    """
    slabs, begin = [], 0
    maxima_a_head = WORKSPACE_BYTES // (4 * max(1, num_heads))
    while begin < num_queries:
        before = min(diagonal + begin, num_keys)
        fitting = (math.sqrt(before**2 + 4 * maxima_a_head * block_size) - before) / 2
        tiles = max(1, int(fitting) // SLAB_STEP)
        end = min(begin + _filling(tiles, num_heads, processors) * SLAB_STEP, num_queries)
        slabs.append((begin, end, -(-min(diagonal + end, num_keys) // block_size)))
        begin = end
    return slabs


def _filling(tiles: int, num_heads: int, processors: int) -> int:
    """How many of ``tiles`` a head, at least half, leave the fewest processors idle at the end."""

    def used(count: int) -> float:
        return count * num_heads / (-(-count * num_heads // processors) * processors)

    # 95% will do: beyond that, fewer slabs are worth more.
    return max(range(-(-tiles // 2), tiles + 1), key=lambda n: (min(used(n), 0.95), n))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
