"""Options of ``hysparse convert``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hysparse_cli.recipe.fields import Dtype, Positive, Real, Section, Size


class ConvertOptions(Section):
    """``hysparse convert``: one of ``ratio``, ``pattern``, ``full_layers`` places the full layers.

    Where none is given, the ratio is 1:3. ``rope_theta`` is a new base of the rotary embedding and
    ``max_position_embeddings`` a new longest input, for a model that will be healed at that length.
    """

    layout: Literal["hysparse", "hybrid-swa", "full"] = "hysparse"
    ratio: str | None = None
    pattern: str | None = None
    full_layers: list[int] | None = None
    last_layer_full: bool = True
    block_size: Positive = 64
    top_k_tokens: Positive = 1024
    window_tokens: Annotated[int, Field(gt=1)] = 128
    rope_theta: Annotated[Real, Field(gt=0)] | None = None
    max_position_embeddings: Positive | None = None
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
        places = ("ratio", "pattern", "full_layers")
        given = [name for name in places if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both place the full layers: give one")
        return self
