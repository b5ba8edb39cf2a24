"""HySparse for existing checkpoints. Importing this package teaches transformers to load them.

The registration waits until something imports transformers' auto classes, so that importing this
package costs next to nothing.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from wrapt import register_post_import_hook

try:
    __version__ = version("hysparse")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))
    if find_spec("hysparse_kernels") is None:
        raise ImportError(
            "hysparse_cli is not installed, and hysparse_kernels is not in kernels/ beside it: "
            "install both with pip install ."
        ) from None


def _register(auto: ModuleType) -> None:
    from hysparse_cli.model.registration import HySparseConfig

    auto.AutoConfig.register(HySparseConfig.model_type, HySparseConfig, exist_ok=True)


register_post_import_hook(_register, "transformers.models.auto.configuration_auto")
