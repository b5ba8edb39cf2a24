"""The table of backends: what is chosen, why another refused, and the override."""

import pytest
import torch

from hysparse_kernels import backends, reference
from hysparse_kernels.backends import BACKENDS, Backend, choose

Q, K = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 1, 4)
PICKY = Backend("picky", reference, lambda op, q, k: f"{op} has D = {q.shape[3]}")


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


def test_every_row_names_a_module_with_all_ops() -> None:
    for backend in BACKENDS:
        for op in (
            "full_attention",
            "block_sparse_attention",
            "sliding_window_attention",
            "gated_sum",
        ):
            assert callable(getattr(backend.module, op))


def test_a_refusal_is_named_and_the_next_row_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", (PICKY, *BACKENDS))
    choice = choose("full_attention", Q, K)
    assert choice.backend.name == "reference"
    assert str(choice) == "reference; picky refused: full_attention has D = 4"


def test_the_environment_variable_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    monkeypatch.setattr(backends, "BACKENDS", (PICKY, *BACKENDS))
    assert str(choose("full_attention", Q, K)) == "reference"


def test_a_named_backend_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", (PICKY, *BACKENDS))
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "picky")
    with pytest.raises(
        ValueError, match="no backend runs full_attention: picky: full_attention has"
    ):
        choose("full_attention", Q, K)


def test_an_unknown_backend_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="HYSPARSE_BACKEND='cuda' is unknown; known: reference"):
        choose("full_attention", Q, K)
