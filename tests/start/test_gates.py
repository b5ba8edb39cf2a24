"""Gates: the best pair for each token, and the linear map that is fitted to them."""

import pytest
import torch

from hysparse_cli.model.gates import GATES
from hysparse_cli.start.gates import Products, best_gates, fit_gates, fit_of, products_of


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def outputs(tokens: int = 200, heads: int = 3, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 1, tokens, heads, dim).unbind()


def test_the_best_pair_is_the_best_of_a_grid() -> None:
    sparse, window = outputs(tokens=60)
    dense = torch.randn(sparse.shape)
    p = products_of(sparse, window, dense)
    found = best_gates(p)
    assert found.min() >= 0 and found.max() <= 1
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 41)] * 2)
    errors = torch.stack([p.error(pair.expand(*p.ss.shape, 2)) for pair in grid])
    assert (p.error(found) <= errors.min(0).values + 1e-5).all()
    on_an_edge = ((found == 0) | (found == 1)).any(-1)
    assert 0.1 < on_an_edge.float().mean() < 0.9, "both kinds of minimum are there"


def test_the_error_is_that_of_the_gated_sum() -> None:
    sparse, window = outputs()
    dense, gates = torch.randn_like(sparse), torch.rand(200, 3, 2)
    direct = gates[..., :1] * sparse[0] + gates[..., 1:] * window[0] - dense[0]
    error = products_of(sparse, window, dense).error(gates)
    assert torch.allclose(error, direct.square().sum(-1), rtol=1e-4, atol=1e-4)


def test_outputs_that_are_parallel_or_zero_have_finite_gates() -> None:
    sparse, _ = outputs()
    sparse[:, :50] = 0
    for window in (sparse, 2 * sparse, torch.zeros_like(sparse)):
        p = products_of(sparse, window, 0.7 * sparse)
        found = best_gates(p)
        assert found.isfinite().all()
        assert p.error(found).max() < 1e-4


def test_gates_that_are_linear_in_the_input_are_found() -> None:
    sparse, window = outputs(tokens=2000)
    x = torch.randn(2000, 16)
    weight = 0.25 * torch.randn(6, 16)
    gates = (x @ weight.T + 0.3).sigmoid().view(-1, 3, 2)
    dense = gates[..., :1] * sparse[0] + gates[..., 1:] * window[0]
    p = products_of(sparse, window, dense[None])
    fitted = fit_gates(x, p, GATES["sigmoid"])
    assert torch.allclose(fitted.weight, weight, atol=2e-2)
    fit = fit_of(x, p, p, fitted)
    assert fit.best < 1e-6 and fit.fitted < 1e-4 < fit.half
    assert len(fit.by_head) == 3 and max(fit.by_head) < 1e-3


def test_more_inputs_than_tokens_do_not_overfit() -> None:
    """The ridge is chosen on tokens that it was not fitted to."""
    sparse, window = outputs(tokens=64)
    dense = 0.2 * sparse + 0.9 * window + 0.1 * torch.randn(sparse.shape)
    p = products_of(sparse, window, dense)
    x = torch.randn(64, 256)
    gates = fit_gates(x, p, GATES["sigmoid"])
    unseen = gates.of(torch.randn(64, 256))
    plain = gates._replace(weight=torch.zeros_like(gates.weight)).of(x)
    assert p.error(unseen).sum() < 1.5 * p.error(plain).sum()


def test_rows_are_a_stretch_of_tokens() -> None:
    p = Products(*torch.arange(24.0).view(6, 4, 1))
    assert p.rows(1, 3).oo.flatten().tolist() == [21.0, 22.0]
