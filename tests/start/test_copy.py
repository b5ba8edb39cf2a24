"""``--init copy``: fitted gates that do less damage than gates of one half."""

from dataclasses import replace

import pytest
import torch

from hysparse_cli.convert.ledger import put_tensors
from hysparse_cli.families import family_of
from hysparse_cli.model.modeling import install
from hysparse_cli.start.copy import copy
from tests.model.equivalences import SPEC, ids
from tests.model.tiny import KINDS, dense_model


@pytest.mark.parametrize("family", KINDS)
def test_fitted_gates_of_every_kind_of_family(family: str) -> None:
    model = dense_model(family).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = copy(model, SPEC, ids(tokens=64), lambda done, total: None)
    assert {n: t for n, t in model.state_dict().items() if not t.equal(before[n])} == {}
    path = family_of(family).attention
    assert start.tensors.keys() == {
        f"{path.format(layer=layer)}.hysparse.gate.{name}"
        for layer in SPEC.layers.sparse_layers
        for name in ("weight", "bias")
    }
    for fit in start.fits.values():
        assert fit.best <= fit.fitted < fit.half
    install(model, SPEC)
    put_tensors(model, start.tensors)


def test_the_errors_are_those_of_the_model_with_these_gates() -> None:
    """One sparse layer on dense inputs is the last layer: compare its output with the report."""
    spec, rows = replace(SPEC, pattern="FFFFS"), ids(tokens=64)
    dense, sparse = dense_model("llama"), dense_model("llama")
    start = copy(dense.float(), spec, rows, lambda done, total: None)
    install(sparse, spec)
    put_tensors(sparse.float(), start.tensors)
    with torch.no_grad():
        sparse.model.layers[4].self_attn.hysparse.sinks.fill_(-1e9)
    outputs: list[torch.Tensor] = []
    for model in (dense, sparse):
        model.model.layers[4].self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: outputs.append(args[0].detach())
        )
        model(rows, use_cache=False)
    expected, found = outputs
    error = (found - expected).square().sum() / expected.square().sum()
    assert start.fits[4].fitted == pytest.approx(float(error), rel=1e-3)
    by_head = (found - expected).unflatten(-1, (4, 8)).square().sum((0, 1, 3))
    by_head /= expected.unflatten(-1, (4, 8)).square().sum((0, 1, 3))
    assert start.fits[4].by_head == pytest.approx(by_head.tolist(), rel=1e-3)
