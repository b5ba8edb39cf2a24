"""Which implementation runs an op: a table tried in order, or what ``HYSPARSE_BACKEND`` names.

A backend is a module with the functions of ``reference.py`` and one row here, whose ``refuses``
gives the reason why it can't run a call, or None.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from hysparse_kernels import reference

ENVIRONMENT_VARIABLE = "HYSPARSE_BACKEND"
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """What a backend may refuse: an op's name, such as "full_attention", and its sizes.

    q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv). block_size: None where the op has none.
    """

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    block_size: int | None = None


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
    names = [backend.name for backend in BACKENDS]
    if forced and forced not in names:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced!r} is unknown; known: {', '.join(names)}")
    refusals: dict[str, str] = {}
    for backend in BACKENDS:
        if forced and backend.name != forced:
            continue
        reason = backend.refuses(call)
        if reason is None:
            return Choice(backend, refusals)
        refusals[backend.name] = reason
        if call.q.device.type == "cuda":
            _say_once(backend.name, call.op, reason)
    raise ValueError(
        f"no backend runs {call.op}: {'; '.join(f'{n}: {w}' for n, w in refusals.items())}"
    )


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
