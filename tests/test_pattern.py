"""Patterns: who is full, who is sparse, who serves whom, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.pattern import Pattern, from_full_layers, from_pattern, from_ratio

patterns = st.text("FS", max_size=60).map(lambda rest: "F" + rest)


def test_a_hybrid_block_is_a_full_layer_and_the_sparse_ones_after_it() -> None:
    layers = Pattern("FSSFFS")
    assert layers.full_layers == (0, 3, 4)
    assert layers.sparse_layers == (1, 2, 5)
    assert [layers.server_of(layer) for layer in range(6)] == [0, 0, 0, 3, 4, 4]
    assert [layers.served_by(layer) for layer in (0, 3, 4)] == [(1, 2), (), (5,)]


@given(patterns)
def test_every_sparse_layer_is_served_by_one_full_layer_before_it(pattern: str) -> None:
    layers = Pattern(pattern)
    served = [layer for full in layers.full_layers for layer in layers.served_by(full)]
    for layer in range(len(layers)):
        assert layers.serves(layer) is (
            layer in layers.full_layers and bool(layers.served_by(layer))
        )
    assert served == list(layers.sparse_layers)
    assert all(layers.server_of(layer) < layer for layer in layers.sparse_layers)


@pytest.mark.parametrize(
    ("ratio", "layers", "expected"),
    [
        ("1:3", 12, "FSSSFSSSFSSF"),
        ("1:3", 9, "FSSSFSSSF"),
        ("1:11", 49, "FSSSSSSSSSSS" * 4 + "F"),
        ("1:0", 3, "FFF"),
        ("1:99", 4, "FSSF"),
        ("1:3", 1, "F"),
    ],
)
def test_ratio(ratio: str, layers: int, expected: str) -> None:
    assert from_ratio(ratio, layers).pattern == expected


def test_the_last_layer_is_sparse_only_where_that_is_asked_for() -> None:
    assert from_ratio("1:3", 8, last_layer_full=False).pattern == "FSSSFSSS"
    assert from_full_layers([0, 2], 5).pattern == "FSFSF"
    assert from_full_layers([0, 2], 5, last_layer_full=False).pattern == "FSFSS"
    assert from_pattern("fsss", 4).pattern == "FSSS"


@pytest.mark.parametrize("pattern", ["", "SF", "FXS", "F S"])
def test_impossible_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(InvalidRecipe):
        Pattern(pattern)


@pytest.mark.parametrize("ratio", ["3", "2:3", "1:", "1:x", "1:-1", ""])
def test_ratios_that_are_none_are_refused(ratio: str) -> None:
    with pytest.raises(InvalidRecipe, match="1:N"):
        from_ratio(ratio, 8)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(InvalidRecipe, match="5 letters, but the model has 4 layers"):
        from_pattern("FSSSF", 4)
    with pytest.raises(InvalidRecipe, match="full_layers has 4, but the model's layers are 0 to 3"):
        from_full_layers([0, 4], 4)
    with pytest.raises(InvalidRecipe, match="layer 0 must be F"):
        from_full_layers([1, 2], 4)
