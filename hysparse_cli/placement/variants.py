"""Runs a dense model as any HySparse pattern of itself, in memory, and measures each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hysparse_cli.families import family_of
from hysparse_cli.model.attention import ATTENTION_NAME
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.layers import GatesAndSinks, sparse_class
from hysparse_cli.model.logits import decoder_of, hidden_states, logits_of
from hysparse_cli.model.modeling import StateHook

LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Quality:
    """loss: of the next token. kl: of the dense model's distribution from this one's. In nats."""

    loss: float
    kl: float


class Variants:
    """Turns ``model`` into HySparse for good; its weights stay where they are, shared by all.

    Sparse layers start as conversion leaves them, but for the gates: constant ones that fit each
    pair of server and served layer best. The gates of a fresh conversion, one half, cost so much in
    every layer that they hide what the layers differ by.
    """

    def __init__(
        self,
        model: Any,
        rows: Tensor,
        spec: HysparseSpec,
        gate_logits: dict[tuple[int, int], Tensor],
    ):
        self.model, self.rows, self.gate_logits = model, rows.to(model.device), gate_logits
        self.dense = self._dense_states()
        family = family_of(model.config.model_type)
        self.attention: list[Any] = []
        for layer in range(model.config.num_hidden_layers):
            attention = model.get_submodule(family.attention.format(layer=layer))
            attention.hysparse = GatesAndSinks(
                model.config.num_attention_heads,
                model.config.hidden_size,
                spec,
                own_sinks=hasattr(attention, "sinks"),
            )
            attention.hysparse.reset_parameters()
            attention.hysparse.to(model.device, model.dtype)
            self.attention.append(attention)
        self.stock: list[Any] = [type(attention) for attention in self.attention]
        self.hook = StateHook(spec)
        decoder_of(model).register_forward_pre_hook(self.hook, with_kwargs=True)
        model.set_attn_implementation(ATTENTION_NAME)

    @torch.no_grad()
    def quality(self, pattern: str, on_row: Callable[[], None] = lambda: None) -> Quality:
        """Measure ``pattern``; ``on_row`` is told after each row of text."""
        self._use(pattern)
        loss = kl = 0.0
        for row, dense in zip(self.rows, self.dense, strict=True):
            hidden = hidden_states(self.model, row[None])
            of_row = self._compare(hidden, dense, row)
            loss, kl = loss + of_row.loss, kl + of_row.kl
            on_row()
        return Quality(loss / len(self.rows), kl / len(self.rows))

    def _use(self, pattern: str) -> None:
        self.hook.spec = replace(self.hook.spec, pattern=pattern)
        layers = self.hook.spec.layers
        for layer, (attention, stock) in enumerate(zip(self.attention, self.stock, strict=True)):
            if layer in layers.full_layers:
                attention.__class__ = stock
                continue
            attention.__class__ = sparse_class(stock)
            logits = self.gate_logits[layers.server_of(layer), layer]
            attention.hysparse.gate.bias.data.copy_(logits.flatten())

    @torch.no_grad()
    def _dense_states(self) -> list[Tensor]:
        return [hidden_states(self.model, row[None]) for row in self.rows]

    def _compare(self, hidden: Tensor, dense: Tensor, row: Tensor) -> Quality:
        stretch = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        loss = kl = 0.0
        predicted = len(row) - 1
        for begin in range(0, predicted, stretch):
            end = min(begin + stretch, predicted)
            log_p, log_q = (
                F.log_softmax(logits_of(self.model, states[:, begin:end])[0].float(), -1)
                for states in (dense, hidden)
            )
            loss += float(F.nll_loss(log_q, row[begin + 1 : end + 1], reduction="sum"))
            kl += float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        return Quality(loss / predicted, kl / predicted)
