"""HySparse for existing checkpoints. Importing this package teaches transformers to load them.

The registration waits until something imports transformers' auto classes, so that importing this
package costs next to nothing.
"""

from importlib.metadata import version
from types import ModuleType

from wrapt import register_post_import_hook

__version__ = version("hysparse")


def _register(auto: ModuleType) -> None:
    from hysparse_cli.model.registration import HySparseConfig

    auto.AutoConfig.register(HySparseConfig.model_type, HySparseConfig, exist_ok=True)


register_post_import_hook(_register, "transformers.models.auto.configuration_auto")
