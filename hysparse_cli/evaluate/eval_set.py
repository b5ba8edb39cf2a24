"""Makes what checkpoints are evaluated on, once for all that share a tokenizer."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hysparse_cli.evaluate.perplexity import Window, cut_windows
from hysparse_cli.evaluate.retrieval import Question
from hysparse_cli.recipe import EvalOptions
from hysparse_cli.texts.facts import Task, write_context
from hysparse_cli.texts.ruler import RULER_FORMS, write_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EvalSet:
    """Windows and questions of the last tokenizer that asked; another gets its own."""

    def __init__(self, documents: Sequence[str] | None, options: EvalOptions):
        self.documents, self.options = documents, options
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._content = ""
        self._windows: list[Window] | None = None
        self._questions: dict[tuple[Task, int], Question] = {}

    def windows(self, tokenizer: "PreTrainedTokenizerBase") -> list[Window] | None:
        """The windows that the loss is measured on (``cut_windows``); None without documents."""
        self._keep_for(tokenizer)
        if self._windows is None and self.documents is not None:
            sizes = (self.options.sequence_tokens, self.options.max_tokens, self.options.stride)
            self._windows = cut_windows(self.documents, tokenizer, *sizes)
        return self._windows

    def digest(self, tokenizer: "PreTrainedTokenizerBase") -> str | None:
        """The SHA-256 of the windows, for comparison; None where there are none."""
        windows = self.windows(tokenizer)
        if not windows:
            return None
        digest = hashlib.sha256()
        for window in windows:
            digest.update(repr(window).encode())
        return digest.hexdigest()

    def question(self, tokenizer: "PreTrainedTokenizerBase", task: Task, index: int) -> Question:
        """The ``index``-th question of ``task`` (see ``write_context`` and ``write_prompt``).

        Raises: InvalidRecipe where it does not fit in the task's tokens.
        """
        self._keep_for(tokenizer)
        if (task, index) not in self._questions:
            write = write_prompt if task.form in RULER_FORMS else write_context
            self._questions[task, index] = write(
                task, index, tokenizer, self.documents, self.options.seed
            )
        return self._questions[task, index]

    def _keep_for(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer is self._tokenizer:
            return
        self._tokenizer = tokenizer
        content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(id(tokenizer))
        if content != self._content:
            self._content, self._windows, self._questions = content, None, {}
