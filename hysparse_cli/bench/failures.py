"""Names why a measurement failed: a failure is a row, and not the end of a run."""

from importlib.util import find_spec

from hysparse_cli.devices import is_out_of_memory
from hysparse_cli.printable import printable

FAILURES: tuple[type[Exception], ...] = (
    *(RuntimeError, MemoryError, ImportError),
    *(ValueError, TypeError, AttributeError, AssertionError),
)
if find_spec("triton"):
    from triton.errors import TritonError

    FAILURES += (TritonError,)

OUT_OF_MEMORY = "out of memory"
REASON_LENGTH = 120


def reason_of(error: Exception) -> str:
    """``OUT_OF_MEMORY``, the module that is missing, or the first sentence of what was said."""
    if isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    said = " ".join(str(error).split()).split(". ")[0].rstrip(".")[:REASON_LENGTH]
    return printable(f"{type(error).__name__}: {said}" if said else type(error).__name__)
