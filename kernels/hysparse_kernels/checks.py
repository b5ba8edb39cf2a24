"""Checks the arguments of the public ops, and brings them into the form that backends take.

Only shapes, dtypes and devices are looked at: to read values, the host would wait for the GPU.
Shape suffixes as in ``reference``: B batch, T queries, S keys, H query heads, G KV heads.
"""

import math

import torch
from torch import Tensor

from hysparse_kernels.key_range import KeyRange, causal

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v")
) -> None:
    """Raises: ValueError unless q (B, T, H, D), k (B, S, G, D) and v (B, S, G, Dv) fit."""
    tensors = q, k, v
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape[:3] != v.shape[:3]:
        shapes = _listed(names, tensors, "shape")
        raise ValueError(f"{shapes}: expected (B, T, H, D), (B, S, G, D), (B, S, G, Dv)")
    H, G, D = q.shape[2], k.shape[2], q.shape[3]
    if q.shape[0] != k.shape[0] or k.shape[3] != D or not (G and H and D) or H % G:
        shapes = _listed(names, tensors, "shape")
        raise ValueError(
            f"{shapes}: B and D must agree, and H be a multiple of G, none of them 0 but B"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in FLOATING:
        raise ValueError(
            f"{_listed(names, tensors, 'dtype')}: expected one floating dtype: {_names(FLOATING)}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"{_listed(names, tensors, 'device')}: expected one device")


def check_outputs(o_sparse: Tensor, o_window: Tensor) -> None:
    """Raises: ValueError unless both branches' outputs are (B, T, H, D), alike in all."""
    names, tensors = ("o_sparse", "o_window"), (o_sparse, o_window)
    if o_sparse.dim() != 4 or o_sparse.shape != o_window.shape:
        raise ValueError(f"{_listed(names, tensors, 'shape')}: expected (B, T, H, D) for both")
    if o_sparse.dtype != o_window.dtype or o_sparse.dtype not in FLOATING:
        raise ValueError(
            f"{_listed(names, tensors, 'dtype')}: expected one floating dtype: {_names(FLOATING)}"
        )
    if o_sparse.device != o_window.device:
        raise ValueError(f"{_listed(names, tensors, 'device')}: expected one device")


def check_positive(**sizes: int | None) -> None:
    """Raises: ValueError on a size below 1."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")


def checked_scale(scale: float | None, softcap: float | None, q: Tensor) -> float:
    """The logits' scale: D ** -0.5 by default. Raises: ValueError on what is no number to use."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}: it must be positive and finite")
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale is {scale}: it must be finite")
    return scale


def checked_sinks(sinks: Tensor | None, q: Tensor, branches: int | None = None) -> Tensor | None:
    """Sinks (H,), or (H, branches), contiguous as kernels read them."""
    if sinks is None:
        return None
    H = q.shape[2]
    expected, legend = ((H,), "(H,)") if branches is None else ((H, branches), "(H, 2)")
    _check("sinks", sinks, expected, legend, FLOATING, q)
    return sinks.contiguous()


def checked_gates(gate_logits: Tensor, q: Tensor) -> Tensor:
    """Gate logits (B, T, H, 2), of any floating dtype."""
    _check("gate_logits", gate_logits, (*q.shape[:3], 2), "(B, T, H, 2)", FLOATING, q)
    return gate_logits


def checked_lists(block_idx: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Lists of blocks (B, T, G, K) as int32."""
    B, T, G = q.shape[0], q.shape[1], k.shape[2]
    kept = block_idx.shape[-1] if block_idx.dim() else 0
    _check("block_idx", block_idx, (B, T, G, kept), "(B, T, G, K)", INTEGER, q)
    return block_idx if block_idx.dtype == torch.int32 else block_idx.int()


def checked_range(
    key_range: KeyRange | None, q: Tensor, k: Tensor, name: str = "key_range"
) -> KeyRange:
    """The range of q's queries over k's slots, slots as int64; plain causal by default."""
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    if key_range is None:
        return causal(T, S, q.device)
    first, last, mask, diagonal = key_range
    for field, x in (("first", first), ("last", last)):
        if x is not None:
            batch = 1 if x.dim() and x.shape[0] == 1 else B
            _check(f"{name}.{field}", x, (batch, T), "(B or 1, T)", INTEGER, q)
    if mask is not None:
        _check(f"{name}.mask", mask, (B, S), "(B, S)", (torch.bool,), q)
    if diagonal is not None:
        if first is not None or mask is not None:
            raise ValueError(
                f"{name}.diagonal is {diagonal}: it says that query t sees all slots to "
                "diagonal + t, so there must be no first and no mask"
            )
        if diagonal + T > S:
            raise ValueError(
                f"{name}.diagonal is {diagonal}: the last of {T} queries would see slot "
                f"{diagonal + T - 1} of {S}"
            )
    if last.dtype == torch.int64 and (first is None or first.dtype == torch.int64):
        return key_range
    return KeyRange(None if first is None else first.long(), last.long(), mask, diagonal)


def _check(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    legend: str,
    dtypes: tuple[torch.dtype, ...],
    q: Tensor,
) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {legend} = {shape}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {_name(x.dtype)}: expected one of {_names(dtypes)}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, but q on {q.device}")


def _listed(names: tuple[str, ...], tensors: tuple[Tensor, ...], attribute: str) -> str:
    values = (getattr(x, attribute) for x in tensors)
    said = (
        str(tuple(value)) if attribute == "shape" else str(value).removeprefix("torch.")
        for value in values
    )
    return ", ".join(f"{name} {value}" for name, value in zip(names, said, strict=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(_name(dtype) for dtype in dtypes)
