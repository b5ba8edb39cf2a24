"""Options of ``hysparse eval``."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hysparse_cli.recipe.fields import Device, Dtype, FilePath, Positive, Section, Seed
from hysparse_cli.texts.facts import FORMS
from hysparse_cli.texts.ruler import RULER_FORMS

if TYPE_CHECKING:
    RetrievalForm = str
else:
    RetrievalForm = Literal[(*FORMS, *RULER_FORMS)]
RULER = "ruler"


class EvalOptions(Section):
    """``hysparse eval``: loss on ``data``, retrieval at ``retrieval_tokens``, tasks of lm-eval.

    Retrieval plants its facts in text of ``data``, or of its own making where there is none. What
    ``data`` may be, and ``text_field``, is said in documents/; ``skip_bad_rows`` counts rows that
    hold no text instead of refusing them. ``lm_eval_folder`` holds tasks for lm_eval, which runs
    the Python code that they name.
    """

    data: FilePath | None = None
    text_field: str = "text"
    skip_bad_rows: bool = False
    sequence_tokens: Positive = 2048
    stride: Positive | None = None
    max_tokens: Positive | None = None
    batch_size: Positive = 1
    retrieval_tokens: list[Positive] = []
    retrieval_forms: Annotated[list[RetrievalForm], Field(min_length=1)] = [*FORMS]
    retrieval_samples: Positive = 10
    retrieval_facts: Positive = 8
    retrieval_questions: Positive = 4
    lm_eval: list[str] = []
    lm_eval_folder: FilePath | None = None
    lm_eval_limit: Positive | None = None
    require: list[str] = []
    output: FilePath | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: bool = False
    seed: Seed = 0

    @field_validator("retrieval_forms", mode="before")
    @classmethod
    def _ruler_names_its_forms(cls, forms: Any) -> Any:
        if not isinstance(forms, list):
            return forms
        named = [name for form in forms for name in (RULER_FORMS if form == RULER else (form,))]
        return [name for place, name in enumerate(named) if name not in named[:place]]

    @model_validator(mode="after")
    def _answerable(self) -> "EvalOptions":
        if self.retrieval_questions > self.retrieval_facts:
            raise ValueError(
                f"retrieval_questions {self.retrieval_questions} is more than retrieval_facts "
                f"{self.retrieval_facts}: each question asks for another fact"
            )
        return self

    @model_validator(mode="after")
    def _windows_touch(self) -> "EvalOptions":
        if self.stride is not None and self.stride > self.sequence_tokens:
            raise ValueError(
                f"stride {self.stride} is more than sequence_tokens {self.sequence_tokens}: the "
                "tokens between windows would be left out"
            )
        return self
