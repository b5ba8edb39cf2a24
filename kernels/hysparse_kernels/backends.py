"""Chooses the backend that runs an op: the first row of a table that takes it, or the one named.

``HYSPARSE_BACKEND`` names one. A backend is a module with the functions of ``reference.py``, called
with their arguments by name, and one row here, whose ``refuses`` gives the reason why it can't run
a call, or None.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hysparse_kernels import reference
from hysparse_kernels.key_range import KeyRange

ENVIRONMENT_VARIABLE = "HYSPARSE_BACKEND"
LOGGER = logging.getLogger(__name__)


class Call(NamedTuple):
    """An op and its arguments, checked and in one form: all that a backend may refuse by.

    op: such as "full_attention". q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv). Of a sparse
    layer k and v are the shared ones; of a gated sum q is o_sparse, k and v are o_window. The
    others are the arguments of the op in ``reference``, None, 0 or False where it has none.
    """

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    block_size: int | None = None
    window_tokens: int | None = None
    block_idx: Tensor | None = None
    window_k: Tensor | None = None
    window_v: Tensor | None = None
    gate_logits: Tensor | None = None
    key_range: KeyRange | None = None
    window_range: KeyRange | None = None
    scale: float | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    top_k_blocks: int = 0
    return_block_scores: bool = False


@dataclass(frozen=True)
class Backend:
    """name: as in ``HYSPARSE_BACKEND``. refuses(call): the reason it can't run it, or None."""

    name: str
    module: ModuleType
    refuses: Callable[[Call], str | None]


@dataclass(frozen=True)
class Choice:
    """The backend that runs an op, and why each one before it in the table refused."""

    backend: Backend
    refusals: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = "".join(f"; {name} refused: {why}" for name, why in self.refusals.items())
        return f"{self.backend.name}{reasons}"


REFERENCE = Backend("reference", reference, lambda call: None)
if find_spec("triton"):
    from hysparse_kernels.triton import backend as triton_backend

    BACKENDS: tuple[Backend, ...] = (
        Backend("triton", triton_backend, triton_backend.refuses),
        REFERENCE,
    )
else:
    BACKENDS = (REFERENCE,)


def choose(call: Call) -> Choice:
    """The first backend of the table that takes this call, or the one the environment names.

    Logs a warning, once, where a backend refuses a call on a GPU.

    Raises: ValueError where ``HYSPARSE_BACKEND`` names an unknown backend, or one that refuses.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    refusals: dict[str, str] = {}
    for backend in (_named(forced),) if forced else BACKENDS:
        reason = backend.refuses(call)
        if reason is None:
            return Choice(backend, refusals)
        refusals[backend.name] = reason
        if call.q.device.type == "cuda":
            _say_once(backend.name, call.op, reason)
    raise ValueError(
        f"no backend runs {call.op}: {'; '.join(f'{n}: {w}' for n, w in refusals.items())}"
    )


def _named(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    known = ", ".join(backend.name for backend in BACKENDS)
    raise ValueError(f"{ENVIRONMENT_VARIABLE}={name!r} is unknown; known: {known}")


@contextmanager
def run_by(backend: str) -> Iterator[None]:
    """Let the backend of this name run every op inside the block."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def _say_once(name: str, op: str, reason: str) -> None:
    LOGGER.warning("%s does not run %s, which will be slower: %s", name, op, reason)
