"""What checkpoints are evaluated on: made once for all that share a tokenizer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hysparse_cli.evaluate.perplexity import cut_windows
from hysparse_cli.evaluate.retrieval import Context, Task, write_context
from hysparse_cli.recipe import EvalOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Texts:
    """Windows and contexts of the last tokenizer that asked; another one gets its own."""

    def __init__(self, documents: Sequence[str] | None, options: EvalOptions):
        self.documents, self.options = documents, options
        self._tokenizer = ""
        self._windows: list[list[int]] | None = None
        self._contexts: dict[tuple[Task, int], Context] = {}

    def windows(self, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]] | None:
        """The windows that the loss is measured on (``cut_windows``); None without documents."""
        self._keep_for(tokenizer)
        if self._windows is None and self.documents is not None:
            self._windows = cut_windows(
                self.documents, tokenizer, self.options.sequence_tokens, self.options.max_tokens
            )
        return self._windows

    def context(self, tokenizer: "PreTrainedTokenizerBase", task: Task, index: int) -> Context:
        """The ``index``-th context of ``task`` (see ``write_context``)."""
        self._keep_for(tokenizer)
        if (task, index) not in self._contexts:
            self._contexts[task, index] = write_context(
                task, index, tokenizer, self.documents, self.options.seed
            )
        return self._contexts[task, index]

    def _keep_for(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        same = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(id(tokenizer))
        if same != self._tokenizer:
            self._tokenizer, self._windows, self._contexts = same, None, {}
