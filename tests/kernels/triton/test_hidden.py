"""What no query sees has no part in results and gradients, NaN and infinities there included."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.calls import Sizes, arguments, d_out_of, run, truth_of
from tests.kernels.tolerance import assert_within_tolerance

# The interpreter's NumPy warns of NaN that a kernel reads and then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
PREFILL = Sizes(T=33, S=52, H=2, G=1, dtype=torch.float16)
DECODE = replace(PREFILL, T=1)
UNSELECTING = {"block_size": None, "top_k_blocks": 0, "return_block_scores": False}
ATTENTION = [
    "full_attention",
    pytest.param("block_sparse_attention", marks=pytest.mark.long),  # a part of a sparse layer
    "sliding_window_attention",
    "sparse_layer_attention",
]


def masked(tensors: dict[str, Tensor], name: str) -> None:
    """Holes, and the first eight tokens of a row, whose queries see nothing."""
    last = tensors[f"{name}.last"]
    tensors[f"{name}.mask"][:, 3::7] = False
    tensors[f"{name}.mask"][0, : int(last[0, 0]) + 8] = False


def longer_than_its_tokens(tensors: dict[str, Tensor], name: str) -> None:
    """Eight slots beyond the last query's; the queries of a row are padding and see nothing."""
    del tensors[f"{name}.mask"]
    tensors[f"{name}.last"] -= 8
    first, last = tensors[f"{name}.first"], tensors[f"{name}.last"]
    first[1] = last[1].max() + 1 if last.shape[1] == 1 else last[1, 12]


HIDING = (masked, longer_than_its_tokens)


def hidden_slots(tensors: dict[str, Tensor], name: str, num_keys: int) -> Tensor:
    """(B, S) bool: slots that no query sees."""
    slots = torch.arange(num_keys, device=tensors[f"{name}.last"].device)
    first, last = tensors[f"{name}.first"], tensors[f"{name}.last"]
    shown = (slots >= first.amin(1, keepdim=True)) & (slots <= last.amax(1, keepdim=True))
    mask = tensors.get(f"{name}.mask")
    return ~shown if mask is None else ~(shown & mask)


def blind_queries(tensors: dict[str, Tensor], name: str, num_keys: int) -> Tensor:
    """(B, T) bool: queries that see no slot at all."""
    slots = torch.arange(num_keys, device=tensors[f"{name}.last"].device)
    first, last = tensors[f"{name}.first"][..., None], tensors[f"{name}.last"][..., None]
    seen = (slots >= first) & (slots <= last)
    mask = tensors.get(f"{name}.mask")
    return ~(seen if mask is None else seen & mask[:, None]).any(-1)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("sizes", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("hide", HIDING)
@pytest.mark.parametrize("op", ATTENTION)
def test_nan_where_no_query_sees(op: str, hide: object, sizes: Sizes, where: str) -> None:
    tensors = arguments(op, sizes, where)
    ranges = {"key_range": ("k", "v")}
    if op == "sparse_layer_attention":
        ranges = {"key_range": ("shared_k", "shared_v"), "window_range": ("window_k", "window_v")}
    blind = torch.ones(sizes.B, sizes.T, dtype=torch.bool, device=where)
    hidden = {}
    for name, of_range in ranges.items():
        assert callable(hide)
        hide(tensors, name)
        blind &= blind_queries(tensors, name, sizes.S)
        hidden |= dict.fromkeys(of_range, hidden_slots(tensors, name, sizes.S))
    clean, dirty = dict(tensors), dict(tensors)
    for name, slots in (hidden | {"q": blind}).items():
        assert slots.any() or name == "q"
        clean[name] = tensors[name].masked_fill(slots[..., None, None], 0)
        dirty[name] = clean[name].masked_fill(slots[..., None, None], torch.nan)
        flat = dirty[name].view(torch.int16)
        flat[..., 0] = torch.where(slots[..., None], 0x7C00, flat[..., 0])  # infinity
    options = UNSELECTING if op == "full_attention" and where == "cpu" else {}
    d_out = d_out_of(op, sizes, where) if sizes.T > 1 else None
    ours, plain = run(op, dirty, d_out, **options), run(op, clean, d_out, **options)
    truth = truth_of(op, clean, d_out, **options)
    for name, x in ours.items():
        if name == "block_idx":
            continue
        assert torch.equal(x.isneginf(), truth[name].isneginf()), name
        finite = (y.masked_fill(y.isneginf(), 0) for y in (x, plain[name], truth[name]))
        assert_within_tolerance(*finite, gradient=name.startswith("d "), name=name)
        if name in ("d " + n for n in hidden):
            assert not x[hidden[name[2:]]].any(), name
