"""Every supported family, every equivalence; and the families that are refused."""

import re

import pytest

from hysparse_cli.errors import UnsupportedModel
from hysparse_cli.families import FAMILIES, REFUSED, check_rope, family_of
from tests.model.equivalences import EQUIVALENCES
from tests.model.tiny import TINY

EXACT = {"all full = dense"}
FLOAT32_INSIDE = {"dots1", "glm4_moe"}  # transformers computes their router in float32


def tolerance(family: str, name: str) -> float:
    if name in EXACT:
        return 0.0
    if name == "shifted by 37":  # transformers' rotary tables are float32
        return 1e-3
    if (family, name) == ("gemma2", "neutral = dense"):  # so is its eager softmax
        return 1e-4
    return 1e-5 if family in FLOAT32_INSIDE else 1e-12


def test_every_family_has_a_tiny_configuration() -> None:
    assert TINY.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("name", EQUIVALENCES)
def test_family(family: str, name: str) -> None:
    assert EQUIVALENCES[name](family) <= tolerance(family, name)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refused_family_gives_its_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModel, match=re.escape(REFUSED[model_type])):
        family_of(model_type)


def test_an_unknown_family_lists_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModel, match=r"'mystery' is not supported.*qwen3"):
        family_of("mystery")


def test_rotary_parameters_by_layer_are_refused_only_where_they_differ() -> None:
    same = {"rope_type": "default", "rope_theta": 1e4}
    check_rope(None)
    check_rope(same)
    check_rope({"full_attention": same, "sliding_attention": dict(same)})
    with pytest.raises(UnsupportedModel, match="differs by layer"):
        check_rope({"full_attention": same, "sliding_attention": {**same, "rope_theta": 1e6}})
