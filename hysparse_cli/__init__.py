"""Teaches transformers to load HySparse checkpoints, once this package is imported.

The registration waits until something imports transformers' auto classes, so that importing this
package costs next to nothing.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from wrapt import register_post_import_hook

if find_spec("hysparse_kernels") is None:  # a source tree that is not installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))
    if find_spec("hysparse_kernels") is None:
        raise ImportError(
            "hysparse_cli is not installed, and hysparse_kernels is not in kernels/ beside it: "
            "install both with pip install ."
        )


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hysparse")
    except PackageNotFoundError:
        return "0+unknown"


def _register(auto: ModuleType) -> None:
    from hysparse_cli.model.registration import HySparseConfig

    auto.AutoConfig.register(HySparseConfig.model_type, HySparseConfig, exist_ok=True)


register_post_import_hook(_register, "transformers.models.auto.configuration_auto")
