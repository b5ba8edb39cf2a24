"""Asks questions about a context, and counts the answers that a model gives rightly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hysparse_cli.evaluate.statistics import Sample
from hysparse_cli.model.logits import hidden_states, logits_of
from hysparse_cli.texts.facts import Context
from hysparse_cli.texts.ruler import Prompt

Question = Context | Prompt


@dataclass(frozen=True)
class Retrieval:
    """How many of the questions of one form and length were answered rightly, by context."""

    form: str
    tokens: int
    sample: Sample

    @property
    def accuracy(self) -> float:
        return self.sample.mean


def count_right(model: Any, tokenizer: Any, questions: Sequence[Question]) -> Sample:
    """How many answers of ``questions``, all of one task, ``model`` gives rightly, by question."""
    contexts = [question for question in questions if isinstance(question, Context)]
    if contexts:
        return count_correct(model, contexts)
    return count_found(model, tokenizer, [q for q in questions if isinstance(q, Prompt)])


@torch.no_grad()
def count_correct(model: Any, contexts: Sequence[Context]) -> Sample:
    """How many answers of ``contexts``, all of one length, ``model`` gives exactly.

    One forward judges them all: where the most likely token at each position of an answer is the
    right one, greedy decoding of that answer writes the same tokens, since each sees the right ones
    before it. For the later questions of a context, the earlier ones stand answered rightly.

    Returns: by context, the answers that are right in every token, of how many.
    """
    input_ids = torch.tensor([context.input_ids for context in contexts], device=model.device)
    hidden = hidden_states(model, input_ids)
    sample = Sample([], [])
    for row, context in enumerate(contexts):
        correct = 0
        for first, end in context.answers:
            logits = logits_of(model, hidden[row : row + 1, first - 1 : end - 1])
            correct += logits[0].argmax(-1).tolist() == context.input_ids[first:end]
        sample.sums.append(correct)
        sample.counts.append(len(context.answers))
    return sample


@torch.no_grad()
def count_found(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> Sample:
    """How many answers of ``prompts``, all of one length, are in what ``model`` writes after them.

    Returns: by prompt, the answers found in its greedy decoding, of how many.
    """
    input_ids = torch.tensor([prompt.input_ids for prompt in prompts], device=model.device)
    # what a checkpoint's generation_config adds to greedy decoding is left out
    written: Tensor = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=prompts[0].max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or 0,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
    )
    texts = tokenizer.batch_decode(written[:, input_ids.shape[1] :], skip_special_tokens=True)
    found = [float(prompt.found_in(text)) for prompt, text in zip(prompts, texts, strict=True)]
    return Sample(found, [len(prompt.answers) for prompt in prompts])
