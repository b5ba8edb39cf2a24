"""Which implementation runs an op: a table tried in order, or what ``HYSPARSE_BACKEND`` names.

A backend is a module with the functions of ``reference.py`` and one row here, whose ``refuses``
gives the reason why it can't run a call, or None.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

from torch import Tensor

from hysparse_kernels import reference

ENVIRONMENT_VARIABLE = "HYSPARSE_BACKEND"


@dataclass(frozen=True)
class Backend:
    """name: as in ``HYSPARSE_BACKEND``. refuses(op, q, k): the reason it can't, or None."""

    name: str
    module: ModuleType
    refuses: Callable[[str, Tensor, Tensor], str | None]


@dataclass(frozen=True)
class Choice:
    """The backend that runs an op, and why each one before it in the table refused."""

    backend: Backend
    refusals: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = "".join(f"; {name} refused: {why}" for name, why in self.refusals.items())
        return f"{self.backend.name}{reasons}"


BACKENDS = (Backend("reference", reference, lambda op, q, k: None),)


def choose(op: str, q: Tensor, k: Tensor) -> Choice:
    """The first backend of the table that takes this call, or the one the environment names.

    Args:
        op: the op's name, such as "full_attention".
        q: (B, T, H, D). k: (B, S, G, D).
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
        reason = backend.refuses(op, q, k)
        if reason is None:
            return Choice(backend, refusals)
        refusals[backend.name] = reason
    raise ValueError(f"no backend runs {op}: {'; '.join(f'{n}: {w}' for n, w in refusals.items())}")
