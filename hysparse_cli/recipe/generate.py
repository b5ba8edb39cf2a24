"""Options of ``hysparse generate``."""

from typing import Annotated

from pydantic import Field

from hysparse_cli.recipe.fields import Device, Dtype, Fraction, Positive, Real, Section, Seed


class GenerateOptions(Section):
    """``hysparse generate``."""

    prompt: str | None = None
    max_new_tokens: Positive = 128
    temperature: Annotated[Real, Field(ge=0)] = 0.0
    top_p: Fraction = 1.0
    num_beams: Positive = 1
    chat: bool = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: bool = False
    seed: Seed = 0
