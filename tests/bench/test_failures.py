"""Why a measurement failed, in a few words that fit a table."""

import pytest
import torch
from triton.errors import TritonError

from hysparse_cli.bench.failures import FAILURES, OUT_OF_MEMORY, reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), OUT_OF_MEMORY),
        (MemoryError(), OUT_OF_MEMORY),
        (ModuleNotFoundError("No module named 'fla'", name="fla"), "fla is not installed"),
        (ValueError("no such thing. And more."), "ValueError: no such thing"),
        (RuntimeError("two\n  lines"), "RuntimeError: two lines"),
        (AssertionError(), "AssertionError"),
        (TypeError("x" * 200), "TypeError: " + "x" * 120),
        (ValueError("\x1b[31mred"), r"ValueError: \x1b[31mred"),
        (TritonError("no"), "TritonError: no"),
    ],
)
def test_the_reason_is_short_and_printable(error: Exception, reason: str) -> None:
    assert isinstance(error, FAILURES) and reason_of(error) == reason
