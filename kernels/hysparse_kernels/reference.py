"""The specification: every op in plain torch, exact in float32 and float64, differentiable.

Shape suffixes: B batch, T queries, S keys, H query heads, G KV heads, R = H / G heads a group,
D head dim, N key blocks, K kept blocks, L gathered keys. bfloat16 and float16 are computed in
float32. Queries go through in slabs, recomputed in the backward, so that memory stays bounded.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.outputs import Attention, FullAttention

FULL_SLAB_ELEMENTS = 1 << 26  # logits of one slab
# Gathered key elements of one slab: small ones stay in a CPU's cache, large ones fill a GPU.
GATHER_SLAB_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}


def full_attention(
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
) -> FullAttention:
    B, T, H, _ = q.shape
    slab = max(1, FULL_SLAB_ELEMENTS // max(1, B * H * k.shape[1]))
    k, v, sinks = _accumulate(k), _accumulate(v), sinks if sinks is None else _accumulate(sinks)

    def attend(begin: int, end: int) -> tuple[Tensor, ...]:
        part, seen = _accumulate(q[:, begin:end]), key_range.slab(begin, end)
        return _full_slab(part, k, v, sinks, seen, scale, softcap, block_size, top_k_blocks)

    out, lse, log_scores, block_idx = _in_slabs(attend, T, slab)
    return FullAttention(
        out.to(q.dtype),
        lse,
        block_idx if top_k_blocks else None,
        log_scores.exp() if return_block_scores else None,
    )


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    key_range: KeyRange,
    *,
    block_size: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Attention:
    within = torch.arange(block_size, device=q.device)

    def slots_of(begin: int, end: int) -> tuple[Tensor, Tensor]:
        seen = key_range.slab(begin, end)
        idx = block_idx[:, begin:end].long()
        first = 0 if seen.first is None else seen.first[:, :, None, None]
        slots = (first + idx * block_size)[..., None] + within  # [B, t, G, K, block_size]
        valid = seen.sees(slots) & (idx >= 0)[..., None]
        return slots.flatten(3), valid.flatten(3)

    return _attend_slots(q, k, v, slots_of, block_idx.shape[-1] * block_size, scale, sinks, softcap)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    *,
    window_tokens: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Attention:
    length = min(window_tokens, k.shape[1])
    back = torch.arange(1 - length, 1, device=q.device)

    def slots_of(begin: int, end: int) -> tuple[Tensor, Tensor]:
        seen = key_range.slab(begin, end)
        slots = (seen.last[..., None] + back)[:, :, None]  # [B, t, 1, window]
        return slots, seen.sees(slots)

    return _attend_slots(q, k, v, slots_of, length, scale, sinks, softcap)


def gated_sum(o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor) -> Tensor:
    gates = torch.sigmoid(_accumulate(gate_logits))
    total = gates[..., :1] * o_sparse + gates[..., 1:] * o_window
    return total.to(o_sparse.dtype)


def select_blocks(log_scores: Tensor, top_k_blocks: int) -> Tensor:
    """The ``top_k_blocks`` best blocks of ``log_scores`` (..., N), ascending, -1 pads at the end.

    A block of score -inf is never selected; ties go to the earlier block.
    """
    num_blocks = log_scores.shape[-1]
    kept = min(top_k_blocks, num_blocks)
    best, order = log_scores.sort(dim=-1, descending=True, stable=True)
    chosen = order[..., :kept].masked_fill(best[..., :kept].isneginf(), num_blocks)
    chosen = chosen.sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == num_blocks, -1).int()
    return F.pad(chosen, (0, top_k_blocks - kept), value=-1)


def _full_slab(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    key_range: KeyRange,
    scale: float,
    softcap: float | None,
    block_size: int | None,
    top_k_blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_BTGRD = _split_groups(q, k.shape[2])
    logits = torch.einsum("btgrd,bsgd->btgrs", q_BTGRD, k) * scale
    slots = torch.arange(k.shape[1], device=q.device)
    visible = key_range.sees(slots.expand(1, q.shape[1], -1))
    logits = _cap(logits, softcap).masked_fill(~visible[:, :, None, None], -torch.inf)
    probs, lse = _softmax(logits, _per_group(sinks, k.shape[2]))
    out = torch.einsum("btgrs,bsgd->btgrd", probs, v).flatten(2, 3)
    none = q.new_empty(*q.shape[:2], 0)
    if block_size is None:
        return out, lse.flatten(2), none, none
    with torch.no_grad():
        log_scores = _log_block_scores(logits, lse, key_range, block_size)
        block_idx = select_blocks(log_scores, top_k_blocks) if top_k_blocks else none
    return out, lse.flatten(2), log_scores, block_idx


def _log_block_scores(logits: Tensor, lse: Tensor, key_range: KeyRange, block_size: int) -> Tensor:
    """log of eq. 3, the maximum over the heads of each group: (B, T, G, N), -inf where unseen."""
    S = logits.shape[-1]
    if key_range.first is not None:  # bring each query's first key to column 0
        columns = torch.arange(S, device=logits.device) + key_range.first[..., None]
        beyond = (columns >= S)[:, :, None, None]
        columns = columns.clamp(max=S - 1)[:, :, None, None].expand_as(logits)
        logits = logits.gather(-1, columns).masked_fill(beyond, -torch.inf)
    padded = F.pad(logits, (0, -S % block_size), value=-torch.inf)
    blocks = padded.shape[-1] // block_size
    best = padded.reshape(*padded.shape[:-1], blocks, block_size).amax(-1)
    normaliser = lse.masked_fill(lse.isneginf(), 0.0)[..., None]
    scores: Tensor = (best - normaliser).amax(3)
    return scores


def _attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots_of: Callable[[int, int], tuple[Tensor, Tensor]],
    num_slots: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Attention:
    """Attend each query to its own key slots; ``slots_of`` gives them and which are valid."""
    B, T, _, D = q.shape
    G = k.shape[2]
    slab = max(1, GATHER_SLAB_ELEMENTS[q.device.type] // max(1, B * G * num_slots * D))
    if torch.is_grad_enabled():  # the gather's backward must add up in full precision
        k, v = _accumulate(k), _accumulate(v)
    sinks = _per_group(sinks if sinks is None else _accumulate(sinks), G)

    def attend(begin: int, end: int) -> tuple[Tensor, ...]:
        q_BTGRD = _split_groups(_accumulate(q[:, begin:end]), G)
        slots, valid = slots_of(begin, end)
        keys, values = _gather(k, slots), _gather(v, slots)
        logits = torch.einsum("btgrd,btgld->btgrl", q_BTGRD, keys) * scale
        logits = _cap(logits, softcap).masked_fill(~valid[:, :, :, None], -torch.inf)
        probs, lse = _softmax(logits, sinks)
        out = torch.einsum("btgrl,btgld->btgrd", probs, values)
        return out.flatten(2, 3), lse.flatten(2)

    out, lse = _in_slabs(attend, T, slab)
    return Attention(out.to(q.dtype), lse)


def _gather(x_BSGD: Tensor, slots: Tensor) -> Tensor:
    """Rows of ``x`` at ``slots`` (B or 1, T, G or 1, L): (B, T, G, L, D).

    Through F.embedding, whose backward adds rows up on all cores. KV caches are (B, G, S, D) in
    memory, so flattening in that order copies nothing.
    """
    B, S, G, D = x_BSGD.shape
    rows = x_BSGD.transpose(1, 2).reshape(B * G * S, D)
    row_of = torch.arange(B * G, device=slots.device).view(B, 1, G, 1) * S
    return _accumulate(F.embedding(row_of + slots.clamp(0, S - 1), rows))


def _softmax(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the last dim with an optional sink in the denominator; a row of -inf gives 0.

    Returns: the probabilities, and the log of the denominator, detached.
    """
    peak = logits.detach().amax(-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.detach())
    peak = peak.masked_fill(peak.isneginf(), 0.0)
    weights = torch.exp(logits - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - peak)
    lse = (peak + total.detach().log()).squeeze(-1)
    return weights / total.masked_fill(total == 0, 1.0), lse


def _in_slabs(
    attend: Callable[[int, int], tuple[Tensor, ...]], num_queries: int, slab: int
) -> tuple[Tensor, ...]:
    """``attend`` over slabs of queries, joined; slabs are recomputed in the backward."""
    if num_queries <= slab:
        return attend(0, num_queries)
    parts = []
    for begin in range(0, num_queries, slab):
        end = min(begin + slab, num_queries)
        if torch.is_grad_enabled():
            parts.append(
                checkpoint(attend, begin, end, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(attend(begin, end))
    return tuple(torch.cat(column, dim=1) for column in zip(*parts, strict=True))


def _split_groups(q: Tensor, num_kv_heads: int) -> Tensor:
    """(B, T, H, D) as (B, T, G, R, D)."""
    B, T, H, D = q.shape
    return q.reshape(B, T, num_kv_heads, H // num_kv_heads, D)


def _per_group(sinks: Tensor | None, num_kv_heads: int) -> Tensor | None:
    """(H,) sinks as (G, R, 1), to stand beside logits (B, T, G, R, L)."""
    return None if sinks is None else sinks.view(num_kv_heads, -1, 1)


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _accumulate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
