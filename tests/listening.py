"""Hearing the attention of a model in a test, and leaving the next test none of it."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers.modeling_utils import AttentionInterface

from hysparse_cli.bench.attention import DENSE_NAME, AttentionPart, record_attention
from hysparse_cli.model.attention import ATTENTION_NAME, hysparse_attention


@pytest.fixture(autouse=True)
def unheard() -> Iterator[None]:
    """Other tests of this process get HySparse's attention back as it was."""
    yield
    AttentionInterface.register(ATTENTION_NAME, hysparse_attention)


def listened(model: Any) -> AttentionPart:
    """What hears the attention of ``model``, a dense one's SDPA too."""
    is_dense = model.config._attn_implementation != "hysparse"
    part = record_attention(is_dense, "sdpa")
    if is_dense:
        model.set_attn_implementation(DENSE_NAME)
    return part
