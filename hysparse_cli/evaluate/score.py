"""Scores a checkpoint, each measurement once: what is finished is taken from the state."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hysparse_cli.devices import out_of_memory_is
from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.evaluate.eval_set import EvalSet
from hysparse_cli.evaluate.harness import Harness, TaskScore
from hysparse_cli.evaluate.perplexity import Loss, measure_loss
from hysparse_cli.evaluate.result import CheckpointScores
from hysparse_cli.evaluate.retrieval import Retrieval, count_right
from hysparse_cli.evaluate.state import Found, Key, State, file_as_it_is
from hysparse_cli.evaluate.statistics import Sample
from hysparse_cli.model.config import spec_of
from hysparse_cli.model.loading import Loaded, load
from hysparse_cli.recipe import EvalOptions
from hysparse_cli.texts.facts import Task

FORMAT = 2  # of what is kept: goes up when a measurement changes

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measurement:
    """``key``: all that it depends on besides the checkpoint and the machine."""

    key: Key
    run: Callable[[str, Loaded], Found]


class Scorer:
    """Scores one checkpoint after the other on the same texts."""

    def __init__(
        self,
        eval_set: EvalSet,
        harness: Harness | None,
        state: State,
        options: EvalOptions,
        environment: dict[str, Any],
        on_progress: Progress,
    ):
        self.eval_set, self.harness, self.state = eval_set, harness, state
        self.options, self.on_progress = options, on_progress
        self._machine = {name: environment[name] for name in environment if name != "threads"}
        self._data = file_as_it_is(Path(options.data)) if options.data is not None else None
        self._tasks = [
            Task(form, tokens, options.retrieval_facts, options.retrieval_questions)
            for form in options.retrieval_forms
            for tokens in options.retrieval_tokens
        ]
        self._first: tuple[str, str | None] | None = None

    def score(self, checkpoint: str, folder: Path) -> CheckpointScores:
        """Measure what is not in the state yet; the model is loaded only for that.

        Raises: UnreadableInput, UnsupportedModel, OutOfResources, InvalidRecipe.
        """
        subject = {
            "format": FORMAT,
            "files": [
                str(folder.resolve()),
                *(file_as_it_is(path) for path in sorted(folder.iterdir()) if path.is_file()),
            ],
            "machine": self._machine,
            "dtype": self.options.dtype,
        }
        loaded: Loaded | None = None
        found: list[Found] = []
        for measurement in self._measurements():
            key = subject | measurement.key
            kept = self.state.get(key)
            if kept is None:
                loaded = loaded or self._load(checkpoint)
                with out_of_memory_is(
                    f"out of memory while evaluating {checkpoint} on {loaded.model.device}: lower "
                    "eval.batch_size, eval.sequence_tokens or eval.retrieval_tokens, or use a "
                    "smaller dtype"
                ):
                    kept = measurement.run(checkpoint, loaded)
                self.state.put(key, kept)
            if not found:
                self._check_windows(checkpoint, kept["windows"])
            found.append(kept)
        return self._scores(checkpoint, iter(found))

    def _measurements(self) -> list[Measurement]:
        options = self.options
        text = {"data": self._data, "text_field": options.text_field}
        sizes = ("sequence_tokens", "stride", "max_tokens")
        windows = text | {name: getattr(options, name) for name in sizes}
        found = [Measurement({"what": "about", **windows}, self._about)]
        if options.data is not None:
            found.append(Measurement({"what": "loss", **windows}, self._loss))
        for task in self._tasks:
            drawn = {"samples": options.retrieval_samples, "seed": options.seed}
            key = {"what": "retrieval", **asdict(task), **drawn, **text}
            found.append(Measurement(key, self._retrieval(task)))
        for name in options.lm_eval:
            assert self.harness is not None
            key = {"what": "lm-eval", "task": name, **self.harness.depends_on()}
            found.append(Measurement(key, self._task(name)))
        return found

    def _scores(self, checkpoint: str, found: Iterator[Found]) -> CheckpointScores:
        """What ``found`` holds, in the order of ``_measurements``."""
        about = next(found)
        loss = _loss_of(next(found)) if self.options.data is not None else None
        retrieval = [
            Retrieval(task.form, task.tokens, Sample(**next(found))) for task in self._tasks
        ]
        tasks = [
            TaskScore(**score | {"sample": score["sample"] and Sample(**score["sample"])})
            for cell in found
            for score in cell["scores"]
        ]
        return CheckpointScores(
            checkpoint, about["attention"], about["dtype"], loss, retrieval, tasks
        )

    def _load(self, checkpoint: str) -> Loaded:
        self.on_progress(f"{checkpoint}: loading", 0, 1)
        options = self.options
        loaded = load(
            checkpoint,
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
        _check_lengths(checkpoint, loaded.model.config, self.options)
        self.on_progress(f"{checkpoint}: tokenizing", 0, 1)
        for task in self._tasks:
            self.eval_set.question(loaded.tokenizer, task, 0)  # raises where it does not fit
        return loaded

    def _about(self, checkpoint: str, loaded: Loaded) -> Found:
        spec = spec_of(loaded.model.config)
        return {
            "attention": "dense" if spec is None else f"{spec.layout} {spec.pattern}",
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "windows": self.eval_set.digest(loaded.tokenizer),
        }

    def _loss(self, checkpoint: str, loaded: Loaded) -> Found:
        windows = self.eval_set.windows(loaded.tokenizer)
        assert windows
        loss = measure_loss(
            loaded.model,
            windows,
            self.options.batch_size,
            lambda done, total: self.on_progress(f"{checkpoint}: loss", done, total),
        )
        return asdict(loss)

    def _retrieval(self, task: Task) -> Callable[[str, Loaded], Found]:
        def measure(checkpoint: str, loaded: Loaded) -> Found:
            total, samples = Sample([], []), self.options.retrieval_samples
            for begin in range(0, samples, self.options.batch_size):
                what = f"{checkpoint}: {task.form}, {task.tokens} tokens"
                self.on_progress(what, begin, samples)
                batch = range(begin, min(begin + self.options.batch_size, samples))
                questions = [self.eval_set.question(loaded.tokenizer, task, i) for i in batch]
                found = count_right(loaded.model, loaded.tokenizer, questions)
                total.sums.extend(found.sums)
                total.counts.extend(found.counts)
            return asdict(total)

        return measure

    def _task(self, name: str) -> Callable[[str, Loaded], Found]:
        def measure(checkpoint: str, loaded: Loaded) -> Found:
            assert self.harness is not None
            self.on_progress(f"{checkpoint}: {name} (lm-eval)", 0, 1)
            return {"scores": [asdict(score) for score in self.harness.run(name, loaded)]}

        return measure

    def _check_windows(self, checkpoint: str, windows: str | None) -> None:
        if self.options.data is not None and windows is None:
            raise UnreadableInput(
                f"data {self.options.data} has less than two tokens: give more text"
            )
        first, its_windows = self._first = self._first or (checkpoint, windows)
        if windows != its_windows:
            raise InvalidRecipe(
                f"{checkpoint} and {first} have different tokenizers, so their losses per token do "
                "not compare: evaluate them apart"
            )


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


def _loss_of(found: Found) -> Loss:
    parts = [Sample(**part) for part in found["parts"]]
    return Loss(Sample(**found["windows"]), parts, found["full_length"])
