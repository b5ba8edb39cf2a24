"""The table of backends: what is chosen, why another refused, and the override."""

import pytest
import torch

from hysparse_kernels import backends, reference
from hysparse_kernels.backends import BACKENDS, REFERENCE, Backend, Call, choose

Q, K = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 1, 4)
CALL = Call("full_attention", Q, K, K)
PICKY = Backend("picky", reference, lambda call: f"{call.op} has D = {call.q.shape[3]}")


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
            "sparse_layer_attention",
        ):
            assert callable(getattr(backend.module, op))


def test_a_refusal_is_named_and_the_next_row_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", (PICKY, REFERENCE))
    choice = choose(CALL)
    assert choice.backend.name == "reference"
    assert str(choice) == "reference; picky refused: full_attention has D = 4"


def test_the_environment_variable_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    monkeypatch.setattr(backends, "BACKENDS", (PICKY, REFERENCE))
    assert str(choose(CALL)) == "reference"


def test_a_named_backend_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", (PICKY, REFERENCE))
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "picky")
    with pytest.raises(
        ValueError, match="no backend runs full_attention: picky: full_attention has"
    ):
        choose(CALL)


def test_an_unknown_backend_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(
        ValueError, match="HYSPARSE_BACKEND='cuda' is unknown; known: triton, reference"
    ):
        choose(CALL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_refusal_on_a_gpu_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "BACKENDS", (PICKY, REFERENCE))
    call = Call("full_attention", Q.cuda(), K.cuda(), K.cuda())
    choose(call)
    choose(call)
    assert caplog.messages == [
        "picky does not run full_attention, which will be slower: full_attention has D = 4"
    ]
