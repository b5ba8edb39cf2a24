"""Options of ``hysparse generate``."""

from typing import Annotated

from pydantic import Field

from hysparse_cli.recipe.fields import (
    Device,
    Dtype,
    Flag,
    Fraction,
    Help,
    Positive,
    Real,
    Section,
    Seed,
    Tokens,
    TrustRemoteCode,
)


class GenerateOptions(Section):
    """``hysparse generate``: continue a prompt."""

    prompt: Annotated[str | None, Flag("What to continue.", "stdin")] = None
    max_new_tokens: Annotated[Tokens, Flag("Tokens to add at most.")] = 128
    temperature: Annotated[Real, Field(ge=0), Flag("0 takes the likeliest token.")] = 0.0
    top_p: Annotated[
        Fraction, Help("Draw from the likeliest tokens that hold this much probability.")
    ] = 1.0
    num_beams: Annotated[Positive, Help("Beams of a beam search; 1 is none.")] = 1
    chat: Annotated[bool, Flag("Put the prompt into the chat template.")] = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
    seed: Seed = 0
