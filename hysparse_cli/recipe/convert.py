"""Options of ``hysparse convert``."""

from typing import Annotated

from pydantic import Field, model_validator

from hysparse_cli.model.config import LayoutName, SparseKv, WindowKv, check_switches
from hysparse_cli.recipe.fields import Dtype, Positive, Section, Size


class ConvertOptions(Section):
    """``hysparse convert``: one of ``ratio``, ``pattern``, ``full_layers`` places the full layers.

    Where none is given, the ratio is 1:3. ``sparse_kv`` and ``window_kv`` are the ablations of the
    paper's Table 4 (model/config.py).
    """

    layout: LayoutName = "hysparse"
    ratio: str | None = None
    pattern: str | None = None
    full_layers: list[int] | None = None
    last_layer_full: bool = True
    block_size: Positive = 64
    top_k_tokens: Positive = 1024
    window_tokens: Annotated[int, Field(gt=1)] = 128
    sparse_kv: SparseKv = "shared"
    window_kv: WindowKv = "own"
    dtype: Dtype = "auto"
    max_shard_size: Size = "5GB"
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "ConvertOptions":
        if self.top_k_tokens % self.block_size:
            raise ValueError(
                f"block_size {self.block_size} does not divide top_k_tokens {self.top_k_tokens}"
            )
        check_switches(self.layout, self.sparse_kv, self.window_kv)
        places = ("ratio", "pattern", "full_layers")
        given = [name for name in places if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both place the full layers: give one")
        return self
