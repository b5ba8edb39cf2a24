"""Makes block lists to measure with: a model's own, local like those, or drawn at random.

All are (1, T, G, K) int32: blocks that the query sees, ascending, -1 pads at the end.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.errors import InvalidRecipe, UnreadableInput

SLAB_QUERIES = 2048
# Weights of what makes a block worth selecting; with these, 8 neighbouring queries of novels-25m's
# shape choose about 35 different blocks of 16 each, and 32 of them 51, as the model's own do.
TOPIC_QUERIES, TOPIC, NOISE, RECENT = 256, 2.0, 0.85, 4.0


def random_lists(
    queries: int, kv_heads: int, top_k_blocks: int, block_size: int, chance: torch.Generator
) -> Tensor:
    """Lists drawn at random, each query's by itself."""
    return _best(queries, kv_heads, top_k_blocks, block_size, chance, local=False)


def local_lists(
    queries: int, kv_heads: int, top_k_blocks: int, block_size: int, chance: torch.Generator
) -> Tensor:
    """Made-up lists that neighbouring queries share about as far as real ones: some blocks are
    everyone's, others a stretch of text's, others one query's, and the latest are always in."""
    return _best(queries, kv_heads, top_k_blocks, block_size, chance, local=True)


def read_lists(
    path: Path, queries: int, kv_heads: int, top_k_blocks: int, block_size: int
) -> Tensor:
    """Lists of a real model, as ``hysparse inspect-topk --lists`` writes them, for other sizes.

    KV heads take the lists of the file's layers and KV heads in turn. A longer text is the file's
    repeated, each time among its own blocks.

    Raises: UnreadableInput where the file can't be read; InvalidRecipe where it was made with other
        sizes.
    """
    stored, made_with = _read(path)
    kept = max(x.shape[2] for x in stored)
    if (kept, made_with) != (top_k_blocks, block_size):
        raise InvalidRecipe(
            f"lists {path} select {kept} blocks of {made_with}: give block_size {made_with} and "
            f"top_k_tokens {kept * made_with} to measure with them"
        )
    maps = torch.cat(stored, dim=1)  # [T, layers x G, K]
    maps = maps[:, torch.arange(kv_heads) % maps.shape[1]]
    whole = maps.shape[0] // block_size * block_size
    if not whole:
        raise InvalidRecipe(f"lists {path} are of less than one block of {block_size} queries")
    repeats = -(-queries // whole)
    shifts = torch.arange(repeats, dtype=torch.int32) * (whole // block_size)
    tiled = maps[None, :whole] + shifts[:, None, None, None]
    tiled = tiled.where(maps[None, :whole] >= 0, -1).flatten(0, 1)
    return tiled[None, :queries].contiguous()


def pairs_of(block_idx: Tensor, block_size: int) -> int:
    """How many (query, key) pairs of one head a group these lists hold, all groups together."""
    last = torch.arange(block_idx.shape[1], device=block_idx.device)[:, None, None]
    visible = (last - block_idx * block_size + 1).clamp(0, block_size)
    return int(visible.where(block_idx >= 0, 0).sum())


def _best(
    queries: int,
    kv_heads: int,
    top_k_blocks: int,
    block_size: int,
    chance: torch.Generator,
    local: bool,
) -> Tensor:
    num_blocks = -(-queries // block_size)
    kept = min(top_k_blocks, num_blocks)
    like: dict[str, Any] = {"generator": chance, "device": chance.device}
    everyones = torch.randn(kv_heads, num_blocks, **like)
    slabs = []
    for begin in range(0, queries, SLAB_QUERIES):
        t = torch.arange(begin, min(begin + SLAB_QUERIES, queries), device=chance.device)
        scores = torch.rand(len(t), kv_heads, num_blocks, **like)
        behind = (t // block_size)[:, None, None] - torch.arange(num_blocks, device=t.device)
        if local:
            topic = torch.randn(SLAB_QUERIES // TOPIC_QUERIES, kv_heads, num_blocks, **like)
            topics = topic[(t - begin) // TOPIC_QUERIES]
            noise = -torch.log(-torch.log(scores.clamp(1e-6, 1 - 1e-6)))
            scores = everyones + TOPIC * topics + NOISE * noise + RECENT * (behind <= 1)
        scores = scores.masked_fill(behind < 0, -torch.inf)
        best, chosen = scores.topk(kept, dim=-1)
        chosen = chosen.masked_fill(best.isneginf(), num_blocks).sort(dim=-1).values
        slabs.append(chosen.masked_fill(chosen == num_blocks, -1).int())
    lists = torch.cat(slabs)[None]
    return torch.nn.functional.pad(lists, (0, top_k_blocks - kept), value=-1)


def _read(path: Path) -> tuple[list[Tensor], int]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            stored = [file.get_tensor(name) for name in names]
            block_size = int((file.metadata() or {}).get("block_size", 0))
    except (OSError, SafetensorError) as error:
        what = " ".join(str(error).split())
        raise UnreadableInput(f"lists {path} can't be read: {what}") from None
    fits = stored and all(x.dim() == 3 and x.dtype == torch.int32 for x in stored)
    if not fits or not block_size:
        raise UnreadableInput(
            f"lists {path} are not what hysparse inspect-topk --lists writes: (T, G, K) int32 for "
            "each layer, and the block_size"
        )
    return stored, block_size
