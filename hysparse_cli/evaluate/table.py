"""Draws an evaluation: checkpoints side by side, differences to the first below the values."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from hysparse_cli.evaluate.requirements import length_name
from hysparse_cli.evaluate.result import CheckpointScores, Evaluation, task_difference
from hysparse_cli.evaluate.statistics import Difference, Sample, difference, mean_difference

if TYPE_CHECKING:
    from rich.console import Group

    from hysparse_cli.tables import Table

MOST_BESIDE_THE_FIRST = 3
HEADERS = 56  # letters of all headers side by side: longer names fold, longer patterns go below

Show = Callable[[float], str]
Scores = Sequence[CheckpointScores]


@dataclass(frozen=True)
class Line:
    """A figure of every checkpoint, and its difference to the first one's where there is one.

    count: of how many the figure is the mean, if that is one number for all.
    """

    name: str
    count: int | None
    values: list[float | None]
    differences: list[Difference | None]
    show: Show
    show_difference: Show

    def cells(self) -> list[str]:
        return [self._cell(*pair) for pair in zip(self.values, self.differences, strict=True)]

    def _cell(self, value: float | None, difference: Difference | None) -> str:
        if value is None or math.isnan(value):
            return "-"
        if difference is None:
            return self.show(value)
        margin = difference.margin
        spread = "" if margin is None else f" ±{self.show_difference(margin).removeprefix('+')}"
        return f"{self.show(value)}\n{self.show_difference(difference.value)}{spread}"


def tables(evaluation: Evaluation) -> "Group":
    """One table for the first checkpoint and up to three others; as many as it takes."""
    from rich.console import Group

    others = range(1, len(evaluation.scores))
    step = MOST_BESIDE_THE_FIRST
    groups = [[0, *others[i : i + step]] for i in range(0, max(1, len(others)), step)]
    return Group(*(_table(evaluation, places) for places in groups))


def _table(evaluation: Evaluation, places: Sequence[int]) -> "Table":
    from rich import box

    from hysparse_cli.tables import Table

    names = [evaluation.names[place] for place in places]
    scores = [evaluation.scores[place] for place in places]
    share = HEADERS // len(places)
    below = [f"± 95% confidence of the difference to {names[0]}"] if len(places) > 1 else []
    below += [
        f"{name}: {score.attention}"
        for name, score in zip(names, scores, strict=True)
        if _is_long(score, share)
    ]
    table = Table(
        title="Evaluation",
        title_justify="left",
        caption="\n".join(below) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    for name, score in zip(names, scores, strict=True):
        folded = [name[i : i + share] for i in range(0, len(name), share)]
        attention = score.attention.split()[0] if _is_long(score, share) else score.attention
        table.add_column("\n".join([*folded, attention]), justify="right", overflow="fold")
    for section in (_of_loss(scores), _of_retrieval(scores), _of_tasks(scores)):
        for line in section:
            count = "" if line.count is None else f"{line.count:,}"
            table.add_row(line.name, count, *line.cells())
        table.add_section()
    for require in evaluation.options.require:
        holds = {v.place: v.holds for v in evaluation.verdicts if v.requirement.text == require}
        words = {True: "holds", False: "fails", None: ""}
        table.add_row(require, "", *(words[holds.get(place)] for place in places))
    if skipped := evaluation.bad_rows.count:
        table.add_row("bad rows skipped", f"{skipped:,}")
    return table


def _is_long(score: CheckpointScores, share: int) -> bool:
    return max(map(len, score.attention.split())) > share


def _of_loss(scores: Scores) -> Iterator[Line]:
    losses = [score.loss for score in scores if score.loss is not None]
    if not losses:
        return
    first = losses[0]
    yield _line("loss", [loss.windows for loss in losses], _nats, _signed_nats)
    values: list[float | None] = [loss.perplexity for loss in losses]
    yield Line("perplexity", None, values, [None] * len(losses), _perplexity, _signed_nats)
    share, rest = divmod(first.full_length - 1, len(first.parts) or 1)
    begin = 1
    for part in range(len(first.parts)):
        end = begin + share + (part < rest)
        samples = [loss.parts[part] for loss in losses]
        yield _line(f"loss at {begin:,}-{end - 1:,}", samples, _nats, _signed_nats)
        begin = end


def _of_retrieval(scores: Scores) -> Iterator[Line]:
    by_length: dict[int, list[Line]] = {}
    for cells in zip(*(score.retrieval for score in scores), strict=True):
        form, tokens = cells[0].form, cells[0].tokens
        samples = [cell.sample for cell in cells]
        line = _line(f"{form}@{length_name(tokens)}", samples, _percent, _points)
        by_length.setdefault(tokens, []).append(line)
        yield line
    for tokens, lines in by_length.items():
        if len(lines) > 1:
            yield _mean_line(f"retrieval@{length_name(tokens)}", lines)


def _of_tasks(scores: Scores) -> Iterator[Line]:
    found = [{(task.task, task.metric): task for task in score.tasks} for score in scores]
    for key, first in found[0].items():
        tasks = [of_one.get(key) for of_one in found]
        yield Line(
            f"{first.task} {first.metric.removesuffix(',none')}",
            None if first.sample is None else first.sample.count,
            [None if task is None else task.value for task in tasks],
            [None, *(task_difference(task, first) for task in tasks[1:])],
            _nats,
            _signed_nats,
        )


def _line(name: str, samples: Sequence[Sample], show: Show, show_difference: Show) -> Line:
    first = samples[0]
    count = first.count if all(sample.count == first.count for sample in samples) else None
    differences = [None, *(difference(sample, first) for sample in samples[1:])]
    values: list[float | None] = [sample.mean for sample in samples]
    return Line(name, count, values, differences, show, show_difference)


def _mean_line(name: str, lines: Sequence[Line]) -> Line:
    """The mean of ``lines``, whose questions are different ones."""
    columns = zip(*(line.values for line in lines), strict=True)
    values: list[float | None] = [mean(x for x in column if x is not None) for column in columns]
    differences = [
        mean_difference([x for x in column if x is not None])
        for column in zip(*(line.differences for line in lines), strict=True)
    ]
    return Line(name, None, values, differences, lines[0].show, lines[0].show_difference)


def _nats(value: float) -> str:
    return f"{value:.4f}"


def _signed_nats(value: float) -> str:
    return f"{value:+.4f}"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"
