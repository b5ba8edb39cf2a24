"""Makes calibration text: rows that need far context, made up or from a file, with planted facts.

Running text alone hardly needs what lies further back than a sliding window, so that measuring on
it would call far attention useless.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.recipe import ConvertOptions
from hysparse_cli.texts.documents import BadRows, read_documents
from hysparse_cli.texts.encoded import encode
from hysparse_cli.texts.facts import FORMS, Context, Task, write_context
from hysparse_cli.texts.haystack import excerpt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 1 << 27
TOKENS_PER_FACT, MOST_FACTS = 128, 16


class CalibrationText(NamedTuple):
    """rows: (N, T) int64. answers: (N, T) bool, the tokens of planted facts' answers."""

    rows: Tensor
    answers: Tensor


def calibration_text(
    tokenizer: "PreTrainedTokenizerBase",
    *,
    data: Path | None,
    text_field: str,
    tokens: int,
    sequence_tokens: int,
    seed: int,
) -> CalibrationText:
    """Rows of tokens to calibrate on, the same for the same arguments.

    Without ``data``, every row plants facts in made-up sentences and asks for them at its end, the
    FORMS in turn. With ``data``, every other row is text of the file as it is, and facts are
    planted in text of the file.

    Args:
        tokenizer: a fast one.
        data: a file, see ``read_documents``; no more than about 128 million characters are read.
        tokens: about how many in all; there is at least one row.
        sequence_tokens: the length T of each row.
    Raises: InvalidRecipe where no fact and question fit in a row; UnreadableInput where the file
        is missing, corrupt or has no text; UnsupportedModel for a tokenizer without offsets.
    """
    documents = None if data is None else _read(data, text_field)
    rows = []
    answers = torch.zeros(max(1, tokens // sequence_tokens), sequence_tokens, dtype=torch.bool)
    for row in range(len(answers)):
        if documents is not None and row % 2 == 0:
            rows.append(_running_text(tokenizer, documents, sequence_tokens, f"{seed} {row}"))
            continue
        planted = row if documents is None else row // 2
        form = FORMS[planted % len(FORMS)]
        context = _planted(tokenizer, documents, form, planted, sequence_tokens, seed)
        rows.append(context.input_ids)
        for begin, end in context.answers:
            answers[row, begin:end] = True
    return CalibrationText(torch.tensor(rows, dtype=torch.int64), answers)


def text_for(
    options: ConvertOptions, tokenizer: "PreTrainedTokenizerBase", config: Any
) -> CalibrationText:
    """The calibration text that ``options`` describe, for a model with this config.

    Raises: as ``calibration_text`` and ``sequence_tokens_of``.
    """
    return calibration_text(
        tokenizer,
        data=None if options.calibration is None else Path(options.calibration),
        text_field=options.calibration_text_field,
        tokens=options.calibration_tokens,
        sequence_tokens=sequence_tokens_of(options, config),
        seed=options.seed,
    )


def sequence_tokens_of(options: ConvertOptions, config: Any) -> int:
    """How long a row is: what the options say, or twice what a sparse layer selects.

    Args:
        config: the model's transformers config.
    Raises: InvalidRecipe where rows would be longer than the model reads.
    """
    longest: int = config.max_position_embeddings
    length = options.calibration_sequence_tokens or min(longest, 2 * options.top_k_tokens)
    if length > longest:
        raise InvalidRecipe(
            f"convert.calibration_sequence_tokens {length} is longer than the model reads: at most "
            f"{longest} tokens"
        )
    return length


def _running_text(
    tokenizer: "PreTrainedTokenizerBase", documents: Sequence[str], tokens: int, seed: str
) -> list[int]:
    text = excerpt_of(tokenizer, documents, tokens, random.Random(seed))
    return encode(tokenizer, text).ids[:tokens]


def _planted(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[str] | None,
    form: str,
    index: int,
    tokens: int,
    seed: int,
) -> Context:
    """A row of mostly filler with some facts, each of them asked for at its end."""
    facts = min(MOST_FACTS, max(1, tokens // TOKENS_PER_FACT))
    while True:
        try:
            task = Task(form, tokens, facts, questions=facts)
            return write_context(task, index, tokenizer, documents, seed)
        except InvalidRecipe:
            if facts == 1:
                raise InvalidRecipe(
                    f"text of {tokens} tokens is too short to plant a fact and ask for it (form "
                    f"{form}): raise convert.calibration_sequence_tokens, or the max_tokens of "
                    "inspect_topk"
                ) from None
            facts //= 2


def _read(data: Path, text_field: str) -> list[str]:
    documents = list(read_documents(data, text_field, most_characters=MOST_CHARACTERS))
    if not documents:
        raise BadRows().no_text(data)
    return documents
