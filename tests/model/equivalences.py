"""Pairs of ways to compute the same thing, each as the largest difference between the two.

    python -m tests.model.equivalences

prints the table of docs/correctness.md: all families, float64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.model.config import HysparseSpec
from tests.model.tiny import TINY, VOCAB_SIZE, dense_model, hysparse_model

SPEC = HysparseSpec("FSSFS", block_size=4, top_k_tokens=8, window_tokens=6)
TOKENS = 40


def ids(seed: int = 0, batch: int = 2, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, tokens), generator=generator)


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def cached(family: str, spec: HysparseSpec = SPEC) -> float:
    """Prefill 25 tokens, then decode one by one, against one forward without a cache."""
    model, x = hysparse_model(family, spec), ids()
    return largest(_in_chunks(model, x, [25] + [1] * 15), model(x, use_cache=False).logits)


@torch.no_grad()
def chunked_prefill(family: str, spec: HysparseSpec = SPEC) -> float:
    """Prefill in chunks of 7, 16, 1 and 16 tokens against one prefill."""
    model, x = hysparse_model(family, spec), ids()
    return largest(_in_chunks(model, x, [7, 16, 1, 16]), model(x, use_cache=True).logits)


@torch.no_grad()
def left_padded(family: str, spec: HysparseSpec = SPEC) -> float:
    """Rows padded by 3 and 9 tokens, prefilled and decoded, against the rows alone."""
    model, x = hysparse_model(family, spec), ids()
    pads = (3, 9)
    padded = torch.stack(
        [torch.cat([x.new_zeros(p), row[: TOKENS - p]]) for p, row in zip(pads, x, strict=True)]
    )
    mask = (torch.arange(TOKENS) >= torch.tensor(pads)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = _in_chunks(model, padded, [30] + [1] * 10, mask, positions)
    alone = [
        model(row[None, : TOKENS - p], use_cache=False).logits
        for p, row in zip(pads, x, strict=True)
    ]
    return max(largest(logits[i, p:], alone[i][0]) for i, p in enumerate(pads))


@torch.no_grad()
def packed(family: str, spec: HysparseSpec = SPEC) -> float:
    """Documents of 11, 23 and 6 tokens in one row, by position_ids, against each alone."""
    model, x = hysparse_model(family, spec), ids(batch=1)
    lengths = [11, 23, 6]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    logits = model(x, position_ids=positions, use_cache=False).logits[0].split(lengths)
    alone = [model(part, use_cache=False).logits[0] for part in x.split(lengths, dim=1)]
    return max(largest(a, b) for a, b in zip(logits, alone, strict=True))


@torch.no_grad()
def shifted(family: str) -> float:
    """Positions from 37 on against positions from 0 on (rotary tables are float32)."""
    model, x = hysparse_model(family, SPEC), ids()
    positions = torch.arange(37, 37 + TOKENS)[None]
    moved = model(x, position_ids=positions, use_cache=False).logits
    return largest(moved, model(x, use_cache=False).logits)


def checkpointed(family: str, spec: HysparseSpec = SPEC) -> float:
    """Gradients under gradient checkpointing against plain ones; two forwards per backward."""
    model = hysparse_model(family, spec).train()
    plain = _gradients(model)
    model._set_gradient_checkpointing(
        True, lambda f, *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=False)
    )
    recomputed = _gradients(model)
    assert plain.keys() == recomputed.keys()
    return max(largest(plain[name], recomputed[name]) for name in plain)


@torch.no_grad()
def neutral(family: str) -> float:
    """Whole context selected, own keys and values, gates and sinks neutral, against dense."""
    spec = HysparseSpec("FSSFS", block_size=8, top_k_tokens=64, window_tokens=6, sparse_kv="own")
    # gemma2 caps its logits, which transformers' sdpa leaves out
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    dense, model, x = dense_model(family, **options), hysparse_model(family, spec), ids()
    model.load_state_dict(dense.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith("hysparse.gate.weight"):
            parameter.zero_()
        if name.endswith("hysparse.gate.bias"):  # sigmoid(1e3) = 1, sigmoid(-1e3) = 0
            parameter.copy_(torch.tensor([1e3, -1e3]).repeat(parameter.numel() // 2))
        if name.endswith("hysparse.sinks"):  # gpt_oss has sinks of its own, which stay
            parameter.fill_(0.0 if family == "gpt_oss" else -1e9)
    return largest(model(x, use_cache=False).logits, dense(x, use_cache=False).logits)


@torch.no_grad()
def all_full(family: str) -> float:
    """--layout full against the dense model."""
    spec = HysparseSpec("FFFFF", layout="full")
    dense, model, x = dense_model(family), hysparse_model(family, spec), ids()
    model.load_state_dict(dense.state_dict())
    return largest(model(x).logits, dense(x).logits)


def _in_chunks(
    model: Any,
    x: Tensor,
    lengths: list[int],
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    logits, past, end = [], None, 0
    for length in lengths:
        begin, end = end, end + length
        output = model(
            x[:, begin:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if positions is None else positions[:, begin:end],
            past_key_values=past,
            use_cache=True,
        )
        past = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)


def _gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    losses = [model(x, labels=x, use_cache=False).loss for x in (ids(1), ids(2))]
    sum(losses).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


EQUIVALENCES: dict[str, Callable[..., float]] = {
    "all full = dense": all_full,
    "neutral = dense": neutral,
    "cached": cached,
    "chunked prefill": chunked_prefill,
    "left-padded": left_padded,
    "packed": packed,
    "checkpointed gradients": checkpointed,
    "shifted by 37": shifted,
}


def main() -> None:
    print("| family | " + " | ".join(EQUIVALENCES) + " |")
    print("|---|" + "---|" * len(EQUIVALENCES))
    for family in TINY:
        cells = " | ".join(f"{difference(family):.1e}" for difference in EQUIVALENCES.values())
        print(f"| {family} | {cells} |")


if __name__ == "__main__":
    main()
