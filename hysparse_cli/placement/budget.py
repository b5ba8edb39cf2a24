"""Counts how many full layers a memory budget holds."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.units import format_bytes


@dataclass(frozen=True)
class Fit:
    """The most full layers that fit, and the bytes of what fits.

    kv_bytes: of ``batch`` sequences of ``context`` tokens together.
    """

    budget_bytes: int
    weight_bytes: int
    kv_bytes: int
    context: int
    batch: int
    num_full: int
    num_layers: int

    def line(self) -> str:
        left = self.budget_bytes - self.weight_bytes - self.kv_bytes
        return (
            f"{self.num_full} of {self.num_layers} layers full fit "
            f"{format_bytes(self.budget_bytes)}: weights {format_bytes(self.weight_bytes)} and KV "
            f"cache {format_bytes(self.kv_bytes)} of {self.batch} x {self.context:,} tokens; "
            f"{format_bytes(left)} are left for activations"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def most_full_layers(
    *,
    budget_bytes: int,
    weight_bytes: int,
    kv_bytes: Callable[[int], int],
    context: int,
    batch: int,
    num_layers: int,
) -> Fit:
    """The most full layers whose weights and KV cache fit ``budget_bytes``.

    Args:
        kv_bytes: of one sequence of ``context`` tokens, by the number of full layers.
    Raises: InvalidRecipe, with the numbers, where not even the first and the last layer fit.
    """
    fewest = min(2, num_layers)
    for num_full in range(num_layers, fewest - 1, -1):
        kv = batch * kv_bytes(num_full)
        if weight_bytes + kv <= budget_bytes:
            return Fit(budget_bytes, weight_bytes, kv, context, batch, num_full, num_layers)
    kv = batch * kv_bytes(fewest)
    raise InvalidRecipe(
        f"fit {format_bytes(budget_bytes)} is too small: with only {fewest} of {num_layers} layers "
        f"full, weights {format_bytes(weight_bytes)} and KV cache {format_bytes(kv)} of "
        f"{batch} x {context:,} tokens need {format_bytes(weight_bytes + kv)}: lower context or "
        "batch, or give more"
    )
