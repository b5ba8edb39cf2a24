"""Numbers as people read them."""

import pytest

from hysparse_cli.printable import single_line, typed_line
from hysparse_cli.units import format_bytes, format_seconds, format_tokens, rounded


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (120 * 1024, "120 KiB"),
        (24 << 30, "24 GiB"),
        (3 << 50, "3072 TiB"),
    ],
)
def test_bytes_have_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (512, "512"), (1024, "1k"), (131072, "128k"), (40_000, "40,000")]
)
def test_tokens_are_named_by_the_thousand_and_twenty_four(count: int, text: str) -> None:
    assert format_tokens(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2.0 h")]
)
def test_seconds_have_the_nearest_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_rounding_reaches_every_float() -> None:
    nested = {"a": [1.23456, 2], "b": (0.000123456, {"c": "x", "d": None})}
    assert rounded(nested, 3) == {"a": [1.23, 2], "b": [0.000123, {"c": "x", "d": None}]}


def test_an_error_is_one_line_with_its_type_where_it_says_nothing() -> None:
    assert single_line(ValueError("two\nlines \x1b[1m")) == "two lines \\x1b[1m"
    assert single_line(KeyError()) == typed_line(KeyError()) == "KeyError"
    assert typed_line(ValueError("no")) == "ValueError: no"
