"""The specification: every op in plain torch, exact in float32 and float64, differentiable.

Shape suffixes: B batch, T queries, S keys, H query heads, G KV heads, R = H / G heads a group,
D head dim, N key blocks, K kept blocks, L gathered keys. bfloat16 and float16 are computed in
float32. Queries go through in slabs, recomputed in the backward, so that memory stays bounded.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hysparse_kernels.key_range import KeyRange
from hysparse_kernels.outputs import Attention, FullAttention
from hysparse_kernels.selection import distinct, log_block_scores, select_blocks

# Logits, or elements of gathered keys, of one slab: what a CPU caches, what fills a GPU.
SLAB_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
SLAB_GATHERED = {"cpu": 1 << 22, "cuda": 1 << 28}
# Gathering a key costs a few times what masking it out costs: gather where that leaves out most.
GATHER_BELOW = 1 / 4


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
    key_range = key_range.inside()
    k, v = _without_hidden(k, v, key_range)

    @torch.no_grad()
    def select(logits: Tensor, total: Tensor, seen: KeyRange) -> tuple[Tensor, ...]:
        if block_size is None:
            return ()
        log_scores = log_block_scores(logits, total, seen, block_size)
        beyond = -(-k.shape[1] // block_size) - log_scores.shape[-1]
        log_scores = F.pad(log_scores, (0, beyond), value=-torch.inf)
        return log_scores, select_blocks(log_scores, top_k_blocks)

    out, lse, *selection = _attend_masked(
        q, k, v, key_range, None, scale=scale, sinks=sinks, softcap=softcap, also=select
    )
    log_scores, block_idx = selection or (None, None)
    return FullAttention(
        out,
        lse,
        block_idx if top_k_blocks else None,
        log_scores.exp() if log_scores is not None and return_block_scores else None,
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
    key_range = key_range.inside()
    k, v = _without_hidden(k, v, key_range)
    num_blocks = -(-k.shape[1] // block_size)
    block_idx = distinct(block_idx, num_blocks)
    within = torch.arange(block_size, device=q.device)

    def slots_of(begin: int, end: int) -> tuple[Tensor, Tensor]:
        seen = key_range.slab(begin, end)
        idx = block_idx[:, begin:end].long()
        first = 0 if seen.first is None else seen.first[:, :, None, None]
        slots = (first + idx * block_size)[..., None] + within  # [B, t, G, K, block_size]
        valid = seen.sees(slots) & (idx >= 0)[..., None]
        return slots.flatten(3), valid.flatten(3)

    def chosen(begin: int, end: int, slots: Tensor) -> Tensor:
        first = key_range.slab(begin, end).first
        block = (slots if first is None else slots - first[..., None]) // block_size
        idx = block_idx[:, begin:end].long()
        listed = idx.new_zeros(*idx.shape[:3], num_blocks + 1, dtype=torch.bool)
        listed.scatter_(3, idx.where(idx >= 0, num_blocks), True)
        block = block.clamp(0, num_blocks - 1)[:, :, None].expand(*idx.shape[:3], -1)
        return listed.gather(3, block)

    num_slots = block_idx.shape[-1] * block_size
    options: dict[str, Any] = {"scale": scale, "sinks": sinks, "softcap": softcap}
    if num_slots < GATHER_BELOW * k.shape[1]:
        return _attend_gathered(q, k, v, slots_of, num_slots, **options)
    return Attention(*_attend_masked(q, k, v, key_range, chosen, **options))


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
    k, v = _without_hidden(k, v, key_range)
    back = torch.arange(1 - min(window_tokens, k.shape[1]), 1, device=q.device)

    def slots_of(begin: int, end: int) -> tuple[Tensor, Tensor]:
        seen = key_range.slab(begin, end)
        slots = (seen.last[..., None] + back)[:, :, None]  # [B, t, 1, window]
        return slots, seen.sees(slots)

    def recent(begin: int, end: int, slots: Tensor) -> Tensor:
        return (slots > key_range.slab(begin, end).last[..., None] - window_tokens)[:, :, None]

    options: dict[str, Any] = {"scale": scale, "sinks": sinks, "softcap": softcap}
    if len(back) < GATHER_BELOW * k.shape[1]:
        return _attend_gathered(q, k, v, slots_of, len(back), **options)
    return Attention(*_attend_masked(q, k, v, key_range, recent, **options))


def gated_sum(o_sparse: Tensor, o_window: Tensor, gate_logits: Tensor) -> Tensor:
    gates = torch.sigmoid(_accumulate(gate_logits))
    total = gates[..., :1] * o_sparse + gates[..., 1:] * o_window
    return total.to(o_sparse.dtype)


def sparse_layer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    gate_logits: Tensor,
    key_range: KeyRange,
    window_range: KeyRange,
    *,
    block_size: int,
    window_tokens: int,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    of_sparse, of_window = (None, None) if sinks is None else sinks.unbind(-1)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap}
    sparse = block_sparse_attention(
        q,
        k,
        v,
        block_idx,
        key_range,
        block_size=block_size,
        sinks=of_sparse,
        **options,
    )
    window = sliding_window_attention(
        q, window_k, window_v, window_range, window_tokens=window_tokens, sinks=of_window, **options
    )
    return gated_sum(sparse.out, window.out, gate_logits)


def _attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_range: KeyRange,
    allowed: Callable[[int, int, Tensor], Tensor] | None,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    also: Callable[[Tensor, Tensor, KeyRange], tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, ...]:
    """Attend over all keys, those masked out that ``key_range`` hides or ``allowed`` leaves out.

    Args:
        allowed: (begin, end, slots (1, t, S)) -> (B, t, G or 1, S) bool.
        also: what else to compute of the masked logits (B, t, G, R, S), less each row's peak, and
            of their softmax's denominators (B, t, G, R, 1).
    Returns: out, lse, and what ``also`` gives.
    """
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]
    k, v = _accumulate(k), _accumulate(v)
    sinks = _per_group(sinks, G)

    def attend(begin: int, end: int) -> tuple[Tensor, ...]:
        seen = key_range.slab(begin, end)
        stop = _stop_key(seen, S)
        slots = torch.arange(stop, device=q.device).expand(1, end - begin, stop)
        visible = seen.sees(slots)[:, :, None]
        if allowed is not None:
            visible = visible & allowed(begin, end, slots)
        q_BTGRD = _split_groups(_accumulate(q[:, begin:end]) * scale, G)
        q_BTGRD = _only(visible.any(-1)[..., None], q_BTGRD)
        logits = _cap(torch.einsum("btgrd,bsgd->btgrs", q_BTGRD, k[:, :stop]), softcap)
        logits = logits.masked_fill(~visible[:, :, :, None], -torch.inf)
        logits, weights, total, lse = _softmax(logits, sinks)
        out = torch.einsum("btgrs,bsgd->btgrd", weights, v[:, :stop]) / total
        more = () if also is None else also(logits, total, seen)
        return out.flatten(2, 3), lse.flatten(2), *more

    out, *rest = _in_slabs(attend, T, max(1, SLAB_LOGITS[q.device.type] // max(1, B * H * S)))
    return out.to(q.dtype), *rest


def _attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots_of: Callable[[int, int], tuple[Tensor, Tensor]],
    num_slots: int,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Attention:
    """Attend each query to its own key slots; ``slots_of`` gives them and which are valid."""
    B, T, _, D = q.shape
    G = k.shape[2]
    slab = max(1, SLAB_GATHERED[q.device.type] // max(1, B * G * num_slots * D))
    if torch.is_grad_enabled():  # the gather's backward must add up in full precision
        k, v = _accumulate(k), _accumulate(v)
    sinks = _per_group(sinks, G)

    def attend(begin: int, end: int) -> tuple[Tensor, ...]:
        q_BTGRD = _split_groups(_accumulate(q[:, begin:end]) * scale, G)
        slots, valid = slots_of(begin, end)
        valid = valid & (slots >= 0) & (slots < k.shape[1])
        q_BTGRD = _only(valid.any(-1)[..., None], q_BTGRD)
        logits = _cap(torch.einsum("btgrd,btgld->btgrl", q_BTGRD, _gather(k, slots)), softcap)
        logits = logits.masked_fill(~valid[:, :, :, None], -torch.inf)
        _, weights, total, lse = _softmax(logits, sinks)
        out = torch.einsum("btgrl,btgld->btgrd", weights, _gather(v, slots)) / total
        return out.flatten(2, 3), lse.flatten(2)

    out, lse = _in_slabs(attend, T, slab)
    return Attention(out.to(q.dtype), lse)


def _gather(x_BSGD: Tensor, slots: Tensor) -> Tensor:
    """Rows of ``x`` at ``slots`` (B or 1, T, G or 1, L): (B, T, G, L, D).

    Through F.embedding, whose backward adds rows up on all cores. KV caches are (B, G, S, D) in
    memory, so flattening in that order copies nothing.
    """
    B, S, G, D = x_BSGD.shape
    if torch.compiler.is_compiling():  # inductor fails on the flattened rows of a window
        batch = torch.arange(B, device=slots.device).view(B, 1, 1, 1)
        heads = torch.arange(G, device=slots.device).view(1, 1, G, 1)
        return _accumulate(x_BSGD[batch, slots.clamp(0, S - 1), heads])
    rows = x_BSGD.transpose(1, 2).reshape(B * G * S, D)
    row_of = torch.arange(B * G, device=slots.device).view(B, 1, G, 1) * S
    return _accumulate(F.embedding(row_of + slots.clamp(0, S - 1), rows))


def _without_hidden(k: Tensor, v: Tensor, key_range: KeyRange) -> tuple[Tensor, Tensor]:
    """``k`` and ``v``, 0 in the slots that no query of a row sees."""
    T, S = key_range.last.shape[1], k.shape[1]
    sees_all = key_range.diagonal is not None and key_range.diagonal + T == S
    if sees_all or not T:
        return k, v
    shown = key_range.shown(S)[..., None]
    return _only(shown, k), _only(shown, v)


def _only(shown: Tensor, x: Tensor) -> Tensor:
    """``x`` (..., D), 0 where ``shown`` (...) is False: NaN may be there, and 0 * NaN is NaN."""
    known = shown.device.type == "cpu" and not torch.compiler.is_compiling()
    return x if known and bool(shown.all()) else x.masked_fill(~shown[..., None], 0.0)


def _softmax(logits: Tensor, sinks: Tensor | None) -> tuple[Tensor, ...]:
    """Softmax over the last dim with an optional sink in the denominator.

    Returns: the logits less their peak; weights, and their total (..., 1) to divide by, 1 for a row
        of -inf, whose weights are 0; and the log of the softmax's denominator, detached, -inf for
        such a row.
    """
    seen = logits.detach() if logits.shape[-1] else F.pad(logits, (0, 1), value=-torch.inf)
    peak = seen.amax(-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.detach())
    peak = peak.masked_fill(peak.isneginf(), 0.0)
    logits = logits - peak
    weights = torch.exp(logits)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - peak)
    lse = (peak + total.detach().log()).squeeze(-1)
    return logits, weights, total.masked_fill(total == 0, 1.0), lse


def _stop_key(seen: KeyRange, num_keys: int) -> int:
    """The slot after the last that these queries may see, where that is known without a wait."""
    if seen.last.device.type != "cpu" or torch.compiler.is_compiling():
        return num_keys
    return max(0, min(num_keys, int(seen.last.max()) + 1)) if seen.last.numel() else 0


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
    return None if sinks is None else _accumulate(sinks).view(num_kv_heads, -1, 1)


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _accumulate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
