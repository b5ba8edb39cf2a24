"""docs/recipes.md lists every field as it is in the code."""

from pathlib import Path

import pytest

from hysparse_cli.recipe import Recipe
from hysparse_cli.recipe.describe import describe
from hysparse_cli.recipe.finetune import StageOptions
from hysparse_cli.recipe.page import PAGE, page

ROOT = Path(__file__).parents[2]
SECTIONS = [*(field.annotation for field in Recipe.model_fields.values()), StageOptions]


def test_the_page_is_what_the_fields_say() -> None:
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page(), (
        "write it again: python -m hysparse_cli.recipe.page"
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_type_and_a_sentence_and_is_on_the_page(section: type) -> None:
    for name, field in section.model_fields.items():  # type: ignore[attr-defined]
        described = describe(field)
        assert described.type and described.help.endswith((".", "?")), name
        assert f"| `{name}` | {described.type} |" in page()
