"""Options of ``hysparse eval``."""

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from hysparse_cli.recipe.fields import (
    TEXT_FILE,
    CommaList,
    Device,
    Dtype,
    FilePath,
    Flag,
    Help,
    Listed,
    Positive,
    Repeated,
    Section,
    Seed,
    SkipBadRows,
    TextField,
    Tokens,
    TrustRemoteCode,
)

Form = Literal["magic-number", "secret", "key-value", "recall"]
Family = Literal[
    "single-needle",
    "multi-key",
    "multi-value",
    "multi-query",
    "variable-tracking",
    "common-words",
    "frequent-words",
]
FORMS: tuple[Form, ...] = get_args(Form)
FAMILIES: tuple[Family, ...] = get_args(Family)
RULER = "ruler"


def _with_families(forms: object) -> object:
    """The names, with the families of RULER in place of its own."""
    if not isinstance(forms, list):
        return forms
    named = [name for form in forms for name in (FAMILIES if form == RULER else (form,))]
    return [name for place, name in enumerate(named) if name not in named[:place]]


Forms = Annotated[
    list[Literal[Form, Family]],
    BeforeValidator(_with_families),
    Listed(","),
    Field(min_length=1),
]


class EvalOptions(Section):
    """``hysparse eval``: loss on ``data``, retrieval at ``retrieval_tokens``, tasks of lm-eval.

    Retrieval plants its facts in text of ``data``, or of its own making where there is none.
    """

    data: Annotated[FilePath | None, Flag(f"{TEXT_FILE}.")] = None
    text_field: TextField = "text"
    skip_bad_rows: SkipBadRows = False
    sequence_tokens: Annotated[Tokens, Flag("Tokens the loss is measured over at once.")] = 2048
    stride: Annotated[Tokens | None, Flag("Slide that window by so many.", "sequence_tokens")] = (
        None
    )
    max_tokens: Annotated[Tokens | None, Flag("Measure the loss on about so many.", "all")] = None
    retrieval_tokens: Annotated[
        CommaList[Tokens], Flag("Context lengths to retrieve from, such as 1k,4k,32k.")
    ] = []
    retrieval_forms: Annotated[
        Forms,
        Flag("Kinds of facts to retrieve; ruler stands for the last seven:"),
    ] = [*FORMS]
    retrieval_samples: Annotated[Positive, Flag("Contexts of each form and length.")] = 10
    retrieval_facts: Annotated[Positive, Help("Facts in each context.")] = 8
    retrieval_questions: Annotated[Positive, Help("Questions asked of each context.")] = 4
    lm_eval: Annotated[
        CommaList[str], Flag("Tasks of lm-evaluation-harness, such as mmlu,gsm8k.")
    ] = []
    lm_eval_folder: Annotated[
        FilePath | None, Help("Folder of tasks for lm_eval, which runs the Python they name.")
    ] = None
    lm_eval_limit: Annotated[Positive | None, Help("Questions of each task.", "all")] = None
    require: Annotated[
        Repeated[str], Flag("Exit with 6 unless it holds: loss<=dense+0.01, retrieval@8k>=0.9.")
    ] = []
    output: Annotated[FilePath | None, Flag("Keep what is finished here, and go on from it.")] = (
        None
    )
    batch_size: Annotated[Positive, Flag("Contexts or windows at once.")] = 1
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False
    seed: Seed = 0

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
