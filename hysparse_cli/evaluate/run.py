"""``hysparse eval``: checkpoints side by side, on text and on retrieval from the context."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hysparse_cli.devices import describe, out_of_memory_is
from hysparse_cli.documents import read_documents
from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.evaluate.perplexity import Loss, measure_loss
from hysparse_cli.evaluate.retrieval import Context, Task
from hysparse_cli.evaluate.texts import Texts
from hysparse_cli.loading import Loaded, load, short_names
from hysparse_cli.logits import hidden_states, logits_of
from hysparse_cli.model.config import spec_of
from hysparse_cli.recipe import EvalOptions

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "hysparse.eval/1"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Retrieval:
    """How many of the questions of one form and length had every token of their answer right."""

    form: str
    tokens: int
    correct: int
    questions: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions


@dataclass(frozen=True)
class CheckpointScores:
    """One checkpoint's results; ``attention`` says what it is, such as ``hysparse FSSSF``."""

    checkpoint: str
    attention: str
    dtype: str
    loss: Loss | None
    retrieval: list[Retrieval]


@dataclass(frozen=True)
class Evaluation:
    """What ``hysparse eval`` found."""

    options: EvalOptions
    environment: dict[str, Any]
    scores: list[CheckpointScores]

    def table(self) -> "Table":
        from rich.table import Table

        table = Table(title="Evaluation", title_justify="left")
        table.add_column("", no_wrap=True)
        names = short_names([score.checkpoint for score in self.scores])
        for name, score in zip(names, self.scores, strict=True):
            table.add_column(f"{name}\n{score.attention}", justify="right")
        losses = [score.loss for score in self.scores]
        if self.scores[0].loss is not None:
            table.add_row("loss, nats/token", *(f"{x.nats_per_token:.4f}" for x in losses if x))
            table.add_row("perplexity", *(f"{x.perplexity:.2f}" for x in losses if x))
            table.add_row("tokens predicted", *(f"{x.tokens:,}" for x in losses if x))
            table.add_section()
        for cells in zip(*(score.retrieval for score in self.scores), strict=True):
            name = f"{cells[0].form} at {cells[0].tokens:,}"
            table.add_row(
                name, *(f"{c.accuracy:7.1%}  {c.correct:>3}/{c.questions}" for c in cells)
            )
        return table

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "options": self.options.model_dump(mode="json"),
            "environment": self.environment,
            "checkpoints": [_score_as_json(score) for score in self.scores],
        }


def evaluate(
    checkpoints: Sequence[str],
    options: EvalOptions,
    on_progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Evaluate ``checkpoints``, one after the other, on the same windows and contexts.

    Args:
        on_progress: told what is running, how much of it is done, and of how much.
    Raises: UnreadableInput, UnsupportedModel, OutOfResources, InvalidRecipe.
    """
    if options.data is None and not options.retrieval_tokens:
        raise InvalidRecipe("nothing to evaluate: give --data, --retrieval-tokens or both")
    texts = Texts(_read(options) if options.data is not None else None, options)
    scores: list[CheckpointScores] = []
    environment: dict[str, Any] = {}
    windows: list[list[int]] | None = None
    for checkpoint in checkpoints:
        loaded = load(checkpoint, dtype=options.dtype, device=options.device)
        environment = describe(loaded.model.device)
        _check_lengths(checkpoint, loaded.model.config, options)
        on_progress(f"{checkpoint}: tokenizing", 0, 1)
        cut = texts.windows(loaded.tokenizer)
        if cut is not None:
            _check_windows(cut, windows, checkpoint, checkpoints[0], options)
            windows = cut
        with out_of_memory_is(
            f"out of memory while evaluating {checkpoint} on {loaded.model.device}: lower "
            "eval.batch_size, eval.sequence_tokens or eval.retrieval_tokens, or use a smaller dtype"
        ):
            scores.append(_score(checkpoint, loaded, texts, options, on_progress))
    return Evaluation(options, environment, scores)


@torch.no_grad()
def count_correct(model: Any, contexts: Sequence[Context], batch_size: int) -> tuple[int, int]:
    """How many answers of ``contexts``, all of one length, ``model`` gives exactly.

    One forward judges them all: where the most likely token at each position of an answer is the
    right one, greedy decoding of that answer writes the same tokens, since each sees the right ones
    before it. For the later questions of a context, the earlier ones stand answered rightly.

    Returns: answers that are right in every token, and answers in all.
    """
    correct = asked = 0
    for begin in range(0, len(contexts), batch_size):
        batch = contexts[begin : begin + batch_size]
        input_ids = torch.tensor([context.input_ids for context in batch], device=model.device)
        hidden = hidden_states(model, input_ids)
        for row, context in enumerate(batch):
            for first, end in context.answers:
                logits = logits_of(model, hidden[row : row + 1, first - 1 : end - 1])
                correct += logits[0].argmax(-1).tolist() == context.input_ids[first:end]
                asked += 1
    return correct, asked


def _score(
    checkpoint: str,
    loaded: Loaded,
    texts: Texts,
    options: EvalOptions,
    on_progress: Progress,
) -> CheckpointScores:
    loss = None
    if (windows := texts.windows(loaded.tokenizer)) is not None:
        loss = measure_loss(
            loaded.model,
            windows,
            options.batch_size,
            lambda done, total: on_progress(f"{checkpoint}: loss", done, total),
        )
    retrieval = []
    for form in options.retrieval_forms:
        for tokens in options.retrieval_tokens:
            task = Task(form, tokens, options.retrieval_facts, options.retrieval_questions)
            retrieval.append(_retrieve(checkpoint, loaded, task, texts, options, on_progress))
    spec = spec_of(loaded.model.config)
    attention = "dense" if spec is None else f"{spec.layout} {spec.pattern}"
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return CheckpointScores(checkpoint, attention, dtype, loss, retrieval)


def _retrieve(
    checkpoint: str,
    loaded: Loaded,
    task: Task,
    texts: Texts,
    options: EvalOptions,
    on_progress: Progress,
) -> Retrieval:
    correct = asked = 0
    for begin in range(0, options.retrieval_samples, options.batch_size):
        on_progress(
            f"{checkpoint}: {task.form}, {task.tokens} tokens", begin, options.retrieval_samples
        )
        end = min(begin + options.batch_size, options.retrieval_samples)
        contexts = [texts.context(loaded.tokenizer, task, index) for index in range(begin, end)]
        right, questions = count_correct(loaded.model, contexts, options.batch_size)
        correct, asked = correct + right, asked + questions
    return Retrieval(task.form, task.tokens, correct, asked)


def _read(options: EvalOptions) -> list[str]:
    assert options.data is not None
    texts = read_documents(Path(options.data), options.text_field)
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise UnreadableInput(f"data {options.data} holds no text: give a file that does")
    return documents


def _check_lengths(checkpoint: str, config: Any, options: EvalOptions) -> None:
    longest = config.max_position_embeddings
    asked = {"retrieval_tokens": max(options.retrieval_tokens, default=0)}
    if options.data is not None:
        asked["sequence_tokens"] = options.sequence_tokens
    for field, tokens in asked.items():
        if tokens > longest:
            raise InvalidRecipe(
                f"eval.{field} {tokens} is longer than {checkpoint} reads: at most {longest} tokens"
            )


def _check_windows(
    windows: list[list[int]],
    first: list[list[int]] | None,
    checkpoint: str,
    first_checkpoint: str,
    options: EvalOptions,
) -> None:
    if not windows:
        raise UnreadableInput(f"data {options.data} has less than two tokens: give more text")
    if first is not None and windows != first:
        raise InvalidRecipe(
            f"{checkpoint} and {first_checkpoint} have different tokenizers, so their losses per "
            "token do not compare: evaluate them apart"
        )


def _score_as_json(score: CheckpointScores) -> dict[str, Any]:
    loss = score.loss
    return {
        "checkpoint": score.checkpoint,
        "attention": score.attention,
        "dtype": score.dtype,
        "loss": loss
        and {
            "nats_per_token": _finite(loss.nats_per_token),
            "perplexity": _finite(loss.perplexity),
            "by_position": [_finite(nats) for nats in loss.by_position],
            "tokens": loss.tokens,
            "windows": loss.windows,
        },
        "retrieval": [{**asdict(cell), "accuracy": cell.accuracy} for cell in score.retrieval],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
