"""Options of ``hysparse eval``."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hysparse_cli.recipe.fields import Device, Dtype, Positive, Section


class EvalOptions(Section):
    """``hysparse eval``: loss on ``data``, retrieval accuracy at ``retrieval_tokens``.

    Retrieval plants its facts in text of ``data``, or of its own making where there is none.
    """

    data: str | None = None
    text_field: str = "text"
    sequence_tokens: Positive = 2048
    max_tokens: Positive | None = None
    batch_size: Positive = 1
    retrieval_tokens: list[Positive] = []
    retrieval_forms: Annotated[
        list[Literal["magic-number", "secret", "key-value", "recall"]], Field(min_length=1)
    ] = ["magic-number", "secret", "key-value", "recall"]
    retrieval_samples: Positive = 10
    retrieval_facts: Positive = 8
    retrieval_questions: Positive = 4
    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: int = 0

    @model_validator(mode="after")
    def _answerable(self) -> "EvalOptions":
        if self.retrieval_questions > self.retrieval_facts:
            raise ValueError(
                f"retrieval_questions {self.retrieval_questions} is more than retrieval_facts "
                f"{self.retrieval_facts}: each question asks for another fact"
            )
        return self
