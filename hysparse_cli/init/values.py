"""Linear maps of the values that a sparse layer shares, and their folding into its weights.

Shape suffixes: G KV heads, R query heads of each, D head dim, C hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from hysparse_cli.errors import UnsupportedModel
from hysparse_cli.families import family_of

RIDGE = 1e-3
# bfloat16 values lose about this times 2^-9 where A is undone: little beside what A gains
LARGEST_CONDITION = 32.0


def mapped(out: Tensor, maps: Tensor) -> Tensor:
    """``out`` (B, T, H, D) times its KV head's map, of ``maps`` (G, D, D), float32."""
    grouped = out.float().unflatten(2, (len(maps), -1))
    return torch.einsum("btgrd,gde->btgre", grouped, maps.to(out.device, torch.float32)).flatten(
        2, 3
    )


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
        size = self.square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        ridge = RIDGE * size * torch.eye(self.square.shape[1], dtype=torch.float64)
        left, values, right = torch.linalg.svd(torch.linalg.solve(self.square + ridge, self.cross))
        values = torch.maximum(values, values[:, :1] / LARGEST_CONDITION)
        maps: Tensor = left @ torch.diag_embed(values) @ right
        return maps


def fold_is_exact(config: Any) -> None:
    """Refuse a model that does something to its values between projection and attention.

    Raises: UnsupportedModel.
    """
    if getattr(config, "clip_qkv", None) is not None:
        raise UnsupportedModel(
            f"this {config.model_type} model clips its values (clip_qkv {config.clip_qkv}), so "
            "they can't be mapped in the weights: use --init copy"
        )


def fold(model: Any, layer: int, maps: Tensor) -> dict[str, Tensor]:
    """o and v of a layer such that another layer's values V are read as V A.

    o becomes A o for the heads of each KV head, and v becomes A^-1 v: what reads the layer's own
    values puts out exactly what it did.

    Args:
        maps: (G, D, D) float64, A for each KV head.
    Returns: the changed tensors by full name, float64.
    """
    family = family_of(model.config.model_type)
    path = family.attention.format(layer=layer)
    attention: Any = model.get_submodule(path)
    A = maps.to(attention.get_submodule(family.output).weight.device)
    o = attention.get_submodule(family.output).weight.double()  # [C, H * D]
    G, D = A.shape[:2]
    by_head = o.unflatten(1, (G, -1, D))
    tensors = {f"{family.output}.weight": torch.einsum("cgrd,ged->cgre", by_head, A).flatten(1)}
    values = attention.get_submodule(family.value.module)
    undone = torch.linalg.inv(A).transpose(1, 2)
    for name, parameter in values.named_parameters():
        rows = family.value.rows(len(parameter), G, D)
        changed = parameter.double().clone()
        own = changed[rows].unflatten(0, (G, D))
        changed[rows] = torch.einsum("gde,ge...->gd...", undone, own).flatten(0, 1)
        tensors[f"{family.value.module}.{name}"] = changed
    return {f"{path}.{name}": tensor.cpu() for name, tensor in tensors.items()}


def _grouped(out: Tensor, num_kv_heads: int) -> Tensor:
    """(B, T, H, D) as (B, T, G, R, D), float32."""
    B, T, _, D = out.shape
    return out.float().reshape(B, T, num_kv_heads, -1, D)
