"""Observing the attention of a model in a test as a bench does."""

from typing import Any

from hysparse_cli.bench.attention import AttentionPart
from hysparse_cli.model.attention import ATTENTION_NAME, DENSE_NAME


def observed(model: Any) -> AttentionPart:
    """The observer of the attention of ``model``, a dense one's SDPA too."""
    part = AttentionPart("sdpa")
    if model.config._attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(DENSE_NAME)
    part.attach(model)
    return part
