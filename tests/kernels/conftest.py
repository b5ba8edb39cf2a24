"""Runs a test by every row of the table of backends."""

import pytest
import torch

from hysparse_kernels import backends
from hysparse_kernels.backends import BACKENDS, Call, Choice, choose

TAKE_ALL = ("triton", "reference")  # every call of these tests: their refusal is a failure


@pytest.fixture(params=BACKENDS, ids=lambda row: row.name)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend that runs all ops of the test; it must take the test's device.

    A backend that is not in ``TAKE_ALL`` skips a test with the reason why it refuses a call.
    """
    names = request.fixturenames
    where: str = request.getfixturevalue("where") if "where" in names else "cpu"
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    row: backends.Backend = request.param
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, row.name)
    q = torch.zeros(1, 1, 1, 16, device=where)
    reason = row.refuses(Call("sliding_window_attention", q, q, q))
    if reason is not None:
        pytest.skip(f"{row.name}: {reason}")
    if row.name not in TAKE_ALL:

        def chosen(call: Call) -> Choice:
            if (refusal := row.refuses(call)) is not None:
                pytest.skip(f"{row.name}: {refusal}")
            return choose(call)

        monkeypatch.setattr("hysparse_kernels.ops.choose", chosen)
    if row.name == "triton":  # ranking many blocks takes the interpreter seconds
        monkeypatch.setattr("hysparse_kernels.triton.full.decode_merge.CHUNK", 16)
    return row.name
