"""Where the kernels are tested: in Triton's interpreter, or on a GPU."""

import os
from collections.abc import Iterator

import pytest
import torch
from triton import knobs

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a test's tensors; torch.empty gives NaN, so that what is unwritten shows."""
    device: str = request.param
    if device == "cpu" and not knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off: set TRITON_INTERPRET=1")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.use_deterministic_algorithms(True)
    yield device
    torch.use_deterministic_algorithms(False)
