"""Fits linear maps of the values that a sparse layer shares, and folds them into its weights.

Shape suffixes: G KV heads, R query heads of each, D head dim, C hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.errors import UnsupportedModel
from hysparse_cli.families import Family

RIDGE = 1e-3
# bfloat16 values lose about this times 2^-9 where A is undone: little beside what A gains
LARGEST_CONDITION = 32.0


def mapped(out: Tensor, maps: Tensor) -> Tensor:
    """``out`` (B, T, H, D) times its KV head's map, of ``maps`` (G, D, D), float32."""
    A = maps.to(out.device, torch.float32)
    on_mapped: Tensor = torch.einsum("btgrd,gde->btgre", _grouped(out, len(A)), A)
    return on_mapped.flatten(2, 3)


class MapFit:
    """The normal equations of a map for each KV head, gathered row by row."""

    def __init__(self, num_kv_heads: int, head_dim: int):
        self.square = torch.zeros(num_kv_heads, head_dim, head_dim, dtype=torch.float64)
        self.cross = torch.zeros_like(self.square)

    def add(self, given: Tensor, wanted: Tensor) -> None:
        """Ask for ``given`` A = ``wanted``, both (B, T, H, D)."""
        a, b = (_grouped(x, len(self.square)) for x in (given, wanted))
        self.square += torch.einsum("btgrd,btgre->gde", a, a).double().cpu()
        self.cross += torch.einsum("btgrd,btgre->gde", a, b).double().cpu()

    def solve(self) -> Tensor:
        """(G, D, D) float64: the ridge solution, well enough conditioned to be undone."""
        left, values, right = torch.linalg.svd(self._ridge())
        values = torch.maximum(values, values[:, :1] / LARGEST_CONDITION)
        maps: Tensor = left @ torch.diag_embed(values) @ right
        return maps

    def gains(self) -> Tensor:
        """(G,) how much of the squared ``wanted`` the ridge solution explains."""
        A = self._ridge()
        return ((2 * self.cross - self.square @ A) * A).sum((1, 2))

    def _ridge(self) -> Tensor:
        size = self.square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        ridge = RIDGE * size * torch.eye(self.square.shape[1], dtype=torch.float64)
        solution: Tensor = torch.linalg.solve(self.square + ridge, self.cross)
        return solution


def fold_is_exact(config: Any) -> None:
    """Refuse a model that does something to its values between projection and attention.

    Raises: UnsupportedModel.
    """
    if getattr(config, "clip_qkv", None) is not None:
        raise UnsupportedModel(
            f"this {config.model_type} model clips its values (clip_qkv {config.clip_qkv}), so "
            "they can't be mapped in the weights: use --init copy"
        )


def fold(family: Family, tensors: Mapping[str, Tensor], maps: Tensor) -> dict[str, Tensor]:
    """o and v of a layer such that another layer's values V are read as V A.

    o becomes A o for the heads of each KV head, and v becomes A^-1 v: what reads the layer's own
    values puts out exactly what it did.

    Args:
        tensors: the attention module's, by name below it. maps: (G, D, D) float64, A by KV head.
    Returns: the changed tensors by name, float64.
    """
    name = f"{family.output}.weight"
    o = tensors[name].double()  # [C, H * D]
    A = maps.to(o.device)
    G, D = A.shape[:2]
    folded = {name: torch.einsum("cgrd,ged->cgre", o.view(len(o), G, -1, D), A).flatten(1)}
    undone = torch.linalg.inv(A).transpose(1, 2)
    for name in (f"{family.value}.weight", f"{family.value}.bias"):
        if name not in tensors:
            continue
        changed = tensors[name].double().clone()
        rows = _value_rows(family, len(changed), G, D)
        own = changed[rows].view(G, D, -1)
        changed[rows] = (undone @ own).view_as(changed[rows])
        folded[name] = changed
    return folded


def _value_rows(family: Family, size: int, num_kv_heads: int, head_dim: int) -> list[int]:
    if family.fused == "by head":
        return [row for row in range(size) if row // head_dim % 3 == 2]
    return list(range(size - num_kv_heads * head_dim, size))


def _grouped(out: Tensor, num_kv_heads: int) -> Tensor:
    """(B, T, H, D) as (B, T, G, R, D), float32."""
    B, T, _, D = out.shape
    return out.float().reshape(B, T, num_kv_heads, -1, D)
