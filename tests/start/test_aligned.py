"""``--init aligned``: folding is exact where a layer reads its own values, and aligns others'."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from hysparse_cli.convert.ledger import put_tensors
from hysparse_cli.errors import InvalidRecipe, UnsupportedModel
from hysparse_cli.families import FAMILIES
from hysparse_cli.model.modeling import install
from hysparse_cli.model.observe import LayerSeen
from hysparse_cli.model.state import ForwardOptions, Shared, Variation
from hysparse_cli.recipe import ConvertOptions, load_section
from hysparse_cli.start.aligned import aligned
from hysparse_cli.start.copy import copy
from hysparse_cli.start.heads import PairFit, assign, reorder, reordered
from hysparse_cli.start.values import LARGEST_CONDITION, MapFit, fold, mapped
from hysparse_kernels import block_sparse_attention
from tests.model.equivalences import SPEC, ids
from tests.model.tiny import KINDS, dense_model

EVERY_BLOCK = torch.arange(15, dtype=torch.int32).expand(1, 60, 3, 15)
# a router or softmax of transformers, or a norm over all heads
FLOAT32_INSIDE = {"dots1", "glm4_moe", "gpt_oss", "olmo2", "olmoe"}


def silent(done: int, total: int) -> None:
    pass


def random_maps(model: Any) -> Tensor:
    attention = model.config
    heads = attention.num_key_value_heads
    size = getattr(attention, "head_dim", None) or attention.hidden_size // 4
    return torch.randn(heads, size, size).double() + 3 * torch.eye(size)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reordering_and_folding_leave_what_reads_its_own_values_as_it_was(family: str) -> None:
    """In float64: the SWA branch, and so the whole model while every layer is dense."""
    model, x = dense_model(family), ids()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # transformers starts biases at 0 and norms at 1
            parameter.add_(0.3 * torch.randn_like(parameter))
    before = model(x).logits
    for layer in (1, 3):
        path = FAMILIES[family].attention.format(layer=layer)
        moved = reorder(model, layer, [1, 0, 3, 2][: model.config.num_key_value_heads])
        folded = fold(FAMILIES[family], moved, random_maps(model))
        put_tensors(model, {f"{path}.{name}": t for name, t in (moved | folded).items()})
    error = (model(x).logits - before).abs().max() / before.abs().max()
    assert error < (1e-5 if family in FLOAT32_INSIDE else 1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3", "qwen2"])
@torch.no_grad()
def test_folding_maps_values_that_come_from_elsewhere(family: str) -> None:
    """A layer that reads V puts out, folded with A, what it put out before on V A."""
    model = dense_model(family)
    install(model, SPEC)
    model.double()
    outputs: list[Tensor] = []
    A = random_maps(model)
    path = FAMILIES[family].attention.format(layer=1)
    attention = model.get_submodule(path)
    output = attention.get_submodule(FAMILIES[family].output)
    given = torch.randn(2, 7, 4, A.shape[1]).double()
    on_mapped = torch.einsum("btgrd,gde->btgre", given.unflatten(2, (len(A), -1)), A).flatten(2)
    outputs.append(output(on_mapped))
    put_tensors(attention, fold(FAMILIES[family], dict(attention.named_parameters()), A))
    outputs.append(output(given.flatten(2)))
    assert torch.allclose(*outputs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", KINDS)
def test_it_does_less_damage_than_copies(family: str) -> None:
    model, rows = dense_model(family).float(), ids(tokens=96)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = aligned(model, SPEC, rows, silent)
    assert {n for n, t in model.state_dict().items() if not t.equal(before[n])} == set()
    copied = copy(model, SPEC, rows, silent)
    for layer, fit in start.fits.items():
        assert fit.half == pytest.approx(copied.fits[layer].half)
        assert fit.copied == pytest.approx(copied.fits[layer].best)
        assert fit.best < fit.copied and fit.best <= fit.fitted < fit.half


@torch.no_grad()
def test_the_aligned_model_with_all_layers_full_is_the_dense_one() -> None:
    """What the ledger takes as its dense model."""
    model, rows = dense_model("qwen3"), ids(tokens=96)
    expected = model(rows).logits
    start = aligned(model, SPEC, rows, silent)
    install(model, SPEC)
    put_tensors(model.double(), start.tensors)
    nothing = Variation(SPEC, frozenset(), learned=True)
    logits = model(rows, use_cache=False, hysparse=ForwardOptions(variation=nothing)).logits
    assert torch.allclose(logits, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(model(rows, use_cache=False).logits, expected, rtol=0, atol=1e-2)


@torch.no_grad()
def test_heads_that_read_each_other_are_put_in_order() -> None:
    """A layer whose server holds its very keys and values with the KV heads swapped."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 60, heads, 8) for heads in (6, 3, 3))
    out = block_sparse_attention(q, k, v, EVERY_BLOCK, block_size=4).out
    seen = LayerSeen(q, q, q, k, v, out, 8**-0.5, None, None)
    elsewhere = [2, 0, 1]
    shared = Shared(k[:, :, elsewhere], v[:, :, elsewhere], EVERY_BLOCK)
    fit = PairFit(3, 8)
    fit.add(replace(SPEC, block_size=4), seen, shared)
    assert fit.order() == elsewhere
    ordered = reordered(seen, elsewhere)
    again = block_sparse_attention(ordered.q, *shared, block_size=4).out
    assert torch.allclose(again, ordered.out, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_assignment_is_the_best_of_all(size: int) -> None:
    for seed in range(20):
        costs = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)).tolist()

        def total(columns: Sequence[int], costs: list[list[float]] = costs) -> float:
            return sum(row[column] for row, column in zip(costs, columns, strict=True))

        found = assign(costs)
        assert sorted(found) == list(range(size))
        assert total(found) == pytest.approx(min(map(total, permutations(range(size)))))


def test_a_map_that_is_there_is_found() -> None:
    torch.manual_seed(0)
    A = torch.eye(6) + 0.3 * torch.randn(2, 6, 6)
    given = torch.randn(1, 500, 4, 6)
    fit = MapFit(2, 6)
    for part in given.split(100, dim=1):
        fit.add(part, mapped(part, A))
    assert torch.allclose(fit.solve().float(), A, atol=1e-2)


def test_a_map_can_always_be_undone() -> None:
    fit = MapFit(2, 6)
    given = torch.randn(1, 500, 4, 6)
    fit.add(given, given[..., :1].expand_as(given))  # of rank 1
    values = torch.linalg.svdvals(fit.solve())
    assert (values[:, 0] / values[:, -1]).max() < LARGEST_CONDITION * 1.001


def test_clipped_values_are_refused() -> None:
    model = dense_model("olmo")
    model.config.clip_qkv = 8.0
    with pytest.raises(UnsupportedModel, match=r"clip_qkv 8\.0.*--init copy"):
        aligned(model, SPEC, ids(), silent)


@pytest.mark.parametrize("switch", ["sparse_kv=own", "window_kv=shared", "window_kv=none"])
def test_it_is_for_shared_values_and_own_windows(switch: str) -> None:
    with pytest.raises(InvalidRecipe, match="init aligned fits layers to shared keys"):
        load_section(ConvertOptions, None, ["convert.init=aligned", f"convert.{switch}"])
