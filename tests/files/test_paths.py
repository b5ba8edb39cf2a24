"""An unset variable is no path: empty and blank paths and names are refused everywhere."""

from pathlib import Path

import pytest
from typer.main import get_command

from hysparse_cli.cli import app
from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.recipe import Recipe, load_section
from tests.conftest import Hysparse

ARGUMENTS = [
    *(("convert", "", "out"), ("convert", "m", ""), ("convert", "m", " \t"), ("convert", " ", "o")),
    *(("eval", ""), ("eval", "m", ""), ("finetune", "m", ""), ("finetune", "", "out")),
    *(("generate", ""), ("bench", ""), ("inspect-topk", "")),
]
PLACES = {
    "convert": (("m", "out"), ("--recipe", "--calibration", "--scores")),
    "finetune": (("m", "out"), ("--recipe", "--data", "--teacher", "--resume")),
    "eval": (("m",), ("--recipe", "--data", "--output")),
    "generate": (("m",), ("--recipe",)),
    "bench": (("m",), ("--recipe", "--config", "--against", "--lists", "--output")),
    "inspect-topk": (
        ("m",),
        ("--recipe", "--data", "--html", "--png", "--npz", "--lists"),
    ),
}
OPTIONS = [
    (command, *args, option) for command, (args, names) in PLACES.items() for option in names
]
FIELDS = [
    (section, name)
    for section, outer in Recipe.model_fields.items()
    for name, field in outer.annotation.model_fields.items()  # type: ignore[union-attr]
    if any(check in f"{field.annotation} {field.metadata}" for check in ("expanded", "check_given"))
]


@pytest.mark.parametrize("args", ARGUMENTS, ids=" ".join)
def test_an_empty_argument_is_a_usage_error(
    hysparse: Hysparse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = hysparse(*args)
    assert run.exit_code == 2 and "it is empty" in run.stderr and run.stdout == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("args", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("value", ["", "  ", "a\0b", "a\udcffb"], ids=repr)
def test_an_option_that_can_be_no_path_is_a_usage_error(
    hysparse: Hysparse, args: tuple[str, ...], value: str
) -> None:
    assert hysparse(*args, value).exit_code == 2


def test_every_flag_of_such_a_field_is_tried() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for section, name in FIELDS:
        command, option = section.removesuffix("_kernels").replace("_", "-"), f"--{name}"
        there = any(option in flag.opts for flag in commands[command].made.params)
        assert there == (option in PLACES[command][1]), (command, option)


@pytest.mark.parametrize(("section", "name"), FIELDS)
@pytest.mark.parametrize("value", ["", " ", "a\0b", "\ud800"], ids=repr)
def test_a_recipe_names_no_such_path(section: str, name: str, value: str) -> None:
    kind = Recipe.model_fields[section].annotation
    given = [value] if name == "against" else value
    with pytest.raises(InvalidRecipe, match=f"{section}.{name}"):
        load_section(kind, None, None, {name: given})  # type: ignore[type-var]


def test_there_are_such_fields() -> None:
    wanted = {"calibration", "scores", "data", "teacher", "resume", "output", "lists", "html"}
    assert wanted <= {name for _, name in FIELDS}


def test_out_may_begin_with_the_users_home(
    hysparse: Hysparse, tiny_original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, working = tmp_path / "home", tmp_path / "working"
    home.mkdir()
    working.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(working)
    assert hysparse("convert", tiny_original, "~/out").exit_code == 0
    assert (home / "out" / "config.json").exists() and not any(working.iterdir())


def test_the_home_of_nobody_is_an_ordinary_name(hysparse: Hysparse, tmp_path: Path) -> None:
    run = hysparse("convert", "~no-such-user/model", tmp_path / "out")
    assert run.exit_code == 7 and run.stderr.count("\n") == 1
