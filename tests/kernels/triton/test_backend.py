"""What the Triton backend refuses, with the reason."""

import pytest
import torch

from hysparse_kernels import backends
from hysparse_kernels.backends import Call
from hysparse_kernels.triton.backend import refuses


def call(where: str, dim: int, dtype: torch.dtype, block_size: int = 64) -> Call:
    q = torch.zeros(1, 3, 2, dim, dtype=dtype, device=where)
    return Call("full_attention", q, q, q, block_size)


@pytest.mark.parametrize(
    ("dim", "dtype", "block_size", "reason"),
    [
        (64, torch.float64, 64, "q is torch.float64"),
        (64, torch.float16, 48, "block_size is 48"),
        (8, torch.float16, 64, "the head dims are 8 and 8: the kernels know 16 to 256"),
        (264, torch.float16, 64, "the head dims are 264 and 264"),
        (20, torch.float16, 64, "rows must be multiples of 16 bytes"),
        (20, torch.float32, 64, None),
    ],
)
def test_what_no_kernel_runs(
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    dim: int,
    dtype: torch.dtype,
    block_size: int,
    reason: str | None,
) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "triton")
    refusal = refuses(call(where, dim, dtype, block_size))
    assert refusal is None if reason is None else refusal and reason in refusal


def test_the_interpreter_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    assert refuses(call("cpu", 64, torch.float32)) is not None
