"""What checkpoints are evaluated on: made once for all that share a tokenizer."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hysparse_cli.evaluate.perplexity import Window, cut_windows
from hysparse_cli.recipe import EvalOptions
from hysparse_cli.recipe.evaluate import FAMILIES
from hysparse_cli.texts.facts import Context, Task, write_context
from hysparse_cli.texts.ruler import Prompt, write_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Texts:
    """Windows, contexts and prompts of the last tokenizer that asked; another gets its own."""

    def __init__(self, documents: Sequence[str] | None, options: EvalOptions):
        self.documents, self.options = documents, options
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._content = ""
        self._windows: list[Window] | None = None
        self._written: dict[tuple[Task, int], Context | Prompt] = {}

    def windows(self, tokenizer: "PreTrainedTokenizerBase") -> list[Window] | None:
        """The windows that the loss is measured on (``cut_windows``); None without documents."""
        self._keep_for(tokenizer)
        if self._windows is None and self.documents is not None:
            sizes = (self.options.sequence_tokens, self.options.max_tokens, self.options.stride)
            self._windows = cut_windows(self.documents, tokenizer, *sizes)
        return self._windows

    def digest(self, tokenizer: "PreTrainedTokenizerBase") -> str | None:
        """What the windows are, for comparison; None where there are none."""
        windows = self.windows(tokenizer)
        if not windows:
            return None
        digest = hashlib.sha256()
        for window in windows:
            digest.update(repr(window).encode())
        return digest.hexdigest()

    def context(self, tokenizer: "PreTrainedTokenizerBase", task: Task, index: int) -> Context:
        """The ``index``-th context of ``task`` (see ``write_context``)."""
        written = self._write(tokenizer, task, index)
        assert isinstance(written, Context)
        return written

    def prompt(self, tokenizer: "PreTrainedTokenizerBase", task: Task, index: int) -> Prompt:
        """The ``index``-th prompt of ``task`` (see ``write_prompt``)."""
        written = self._write(tokenizer, task, index)
        assert isinstance(written, Prompt)
        return written

    def check(self, tokenizer: "PreTrainedTokenizerBase", task: Task) -> None:
        """Raises: InvalidRecipe where ``task`` does not fit in its tokens."""
        self._write(tokenizer, task, 0)

    def _write(
        self, tokenizer: "PreTrainedTokenizerBase", task: Task, index: int
    ) -> Context | Prompt:
        self._keep_for(tokenizer)
        if (task, index) not in self._written:
            write = write_prompt if task.form in FAMILIES else write_context
            self._written[task, index] = write(
                task, index, tokenizer, self.documents, self.options.seed
            )
        return self._written[task, index]

    def _keep_for(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer is self._tokenizer:
            return
        self._tokenizer = tokenizer
        content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(id(tokenizer))
        if content != self._content:
            self._content, self._windows, self._written = content, None, {}
