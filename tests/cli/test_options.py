"""Flags come from the recipe's fields: each one is there, with its default, and reads alike."""

import pytest
from typer.main import get_command

from hysparse_cli.cli import COMMANDS, app
from hysparse_cli.recipe import Recipe
from hysparse_cli.recipe.describe import describe
from hysparse_cli.recipe.fields import Flag
from tests.conftest import Hysparse

SECTIONS = [name for name in COMMANDS if name.replace("-", "_") in Recipe.model_fields]


def options_of(command: str) -> dict[str, str]:
    """The help of every flag."""
    made = get_command(app).commands[command].made  # type: ignore[attr-defined]
    return {name: p.help for p in made.params for name in p.opts if name.startswith("--")}


@pytest.mark.parametrize("command", SECTIONS)
def test_a_command_has_a_flag_for_each_field_that_says_so(command: str) -> None:
    kind = Recipe.model_fields[command.replace("-", "_")].annotation
    shown = options_of(command)
    for name, field in kind.model_fields.items():  # type: ignore[union-attr]
        flag = f"--{name.replace('_', '-')}"
        is_flag = any(isinstance(part, Flag) for part in field.metadata)
        assert (flag in shown) is is_flag
        assert not is_flag or shown[flag] == describe(field).line


def test_every_section_has_its_command() -> None:
    assert len(SECTIONS) == len(Recipe.model_fields)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("convert", "m", "out", "--block-size", "x"), "'x': not a whole number such as 64"),
        (("convert", "m", "out", "--rope-theta", "x"), "'x': not a number such as 0.1"),
        (("bench", "m", "--against", "b", "--against", " "), "it is empty"),
    ],
)
def test_text_that_is_no_such_value_is_wrong_usage(
    hysparse: Hysparse, args: tuple[str, ...], said: str
) -> None:
    run = hysparse(*args)
    assert run.exit_code == 2 and said in " ".join(run.stderr.split())


def test_wrong_flags_are_all_said_at_once(hysparse: Hysparse) -> None:
    flags = (
        "--layout",
        "flat",
        "--fit",
        "much",
        "--swap-attention",
        "1",
        "--full-layers",
        "0,x",
        "--context",
        "8m",
    )
    run = hysparse("convert", "m", "out", *flags)
    assert run.exit_code == 3 and run.stderr.count("\n") == 1
    for field in ("layout", "fit", "swap_attention", "full_layers.1", "context"):
        assert f"convert.{field}: " in run.stderr


def test_flags_win_over_set_and_set_over_the_recipe(hysparse: Hysparse) -> None:
    sets = ("--set", "convert.init=x", "--set", "convert.layout=y")
    run = hysparse("convert", "m", "out", "--layout", "z", *sets)
    assert "convert.init" in run.stderr and "(got 'z')" in run.stderr and "'y'" not in run.stderr


def test_help_says_how_a_value_is_written(
    hysparse: Hysparse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = " ".join(hysparse("convert", "--help").stdout.split())
    for text in (
        "--context <tokens>",
        "--full-layers <int,...>",
        "--fit <size>",
        "--init <name> How new layers start: constant, copy or aligned. [default: constant]",
    ):
        assert text in shown
