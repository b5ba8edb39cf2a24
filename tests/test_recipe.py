"""Recipes: where options come from, and that every error is reported at once with its path."""

from pathlib import Path

import pytest

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.recipe import (
    ConvertOptions,
    FinetuneOptions,
    Recipe,
    Section,
    bytes_of,
    integer_list,
    load_section,
    to_yaml,
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("convert:\n  ratio: '1:1'\n  block_size: 32\n  window_tokens: 64\n")
    return path


def test_later_sources_win(recipe: Path) -> None:
    options = load_section(
        ConvertOptions,
        recipe,
        ("convert.block_size=16", "convert.top_k_tokens=512"),
        {"top_k_tokens": 256, "dtype": None},
    )
    assert (options.ratio, options.window_tokens) == ("1:1", 64)
    assert (options.block_size, options.top_k_tokens, options.dtype) == (16, 256, "auto")


def test_an_empty_recipe_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_section(ConvertOptions, path) == ConvertOptions()


def test_yaml_numbers_with_an_exponent_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("finetune:\n  learning_rate: 1e-3\n")
    assert load_section(FinetuneOptions, path).learning_rate == 1e-3


@pytest.mark.parametrize("kind", [field.annotation for field in Recipe.model_fields.values()])
def test_a_resolved_section_reads_back_unchanged(kind: type, tmp_path: Path) -> None:
    assert issubclass(kind, Section)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(kind()))
    assert load_section(kind, path) == kind()


def test_all_errors_are_reported_at_once_each_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "convert:\n  blocksize: 64\n  window_tokens: wide\n  max_shard_size: big\n"
        "finetune:\n  steps: 1.5\nfoo: {}\n"
    )
    with pytest.raises(InvalidRecipe) as error:
        load_section(ConvertOptions, path)
    message = str(error.value)
    wrong = ("convert.blocksize", "convert.window_tokens", "convert.max_shard_size")
    for where in (str(path), *wrong, "finetune.steps", "foo", "(got 'wide')"):
        assert where in message
    assert "\n" not in message and "block_size" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("convert: [", "not valid YAML"),
        ("- convert", "must be a mapping"),
        ("convert: 3", "convert"),
        ("convert: {block_size: 48}", "block_size 48 does not divide top_k_tokens 1024"),
        ("convert: {pattern: FSF, ratio: '1:3'}", "ratio and pattern both place the full layers"),
        ("convert: {block_size: true}", "convert.block_size"),
    ],
)
def test_wrong_recipes_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRecipe, match=reason) as error:
        load_section(ConvertOptions, path)
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnreadableInput, match="No such file"):
        load_section(ConvertOptions, tmp_path / "absent.yaml")


@pytest.mark.parametrize("assignment", ["block_size=3", "convert.block_size", "convert.=1"])
def test_assignments_need_a_section_a_field_and_a_value(assignment: str) -> None:
    with pytest.raises(InvalidRecipe, match=r"section\.field=value"):
        load_section(ConvertOptions, None, (assignment,))


def test_sizes_and_lists_of_layers() -> None:
    assert [bytes_of(text) for text in ("5GB", "2 GiB", "300kb", "17")] == [
        5 * 10**9,
        2 * 2**30,
        300_000,
        17,
    ]
    assert integer_list("full_layers", "0, 4,8") == [0, 4, 8]
    assert integer_list("full_layers", None) is None
    with pytest.raises(InvalidRecipe, match="full_layers '0,x'"):
        integer_list("full_layers", "0,x")
