"""Shows the progress of a command on stderr: a bar on a terminal, else lines."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread, Timer
from typing import Any, NamedTuple

from hysparse_cli.printable import printable
from hysparse_cli.units import format_bytes, format_seconds

PATIENCE_SECONDS = 2.0
TICK_SECONDS = 0.25
LINE_SECONDS = 30.0
LINE_SHARE = 0.1  # of a stage between its lines; of the time so far before another stage's
LONGEST_STAGE = 60

OnStage = Callable[[str, int, int], None]


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of work that takes a while; tell it bytes done and in all."""
    from rich.progress import DownloadColumn

    with _shown(what, DownloadColumn(binary_units=True), _bytes) as update:
        yield lambda done, total: update(what, done, total)


@contextmanager
def stages() -> Iterator[OnStage]:
    """As above for work in stages; tell it the stage, and the steps done and in all."""
    from rich.progress import MofNCompleteColumn

    with _shown("loading", MofNCompleteColumn(), _steps) as update:
        yield update


class Training(NamedTuple):
    """What a training run tells: the stages around its steps, and each step."""

    on_stage: OnStage
    on_step: Callable[[Any], None]


@contextmanager
def training() -> Iterator[Training]:
    """A live table for finetuning; where stderr is no terminal, a line now and then."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=_Stderr())  # type: ignore[arg-type]
    if not console.is_terminal:
        with _lines("loading", _steps) as lines:

            def line(now: Any) -> None:
                lines.pause()
                _training_line(now)

            yield Training(lines.update, line)
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def show(drawn: Any) -> None:
            live.update(drawn, refresh=True)

        yield Training(
            lambda stage, done, total: show(Text(printable(stage))),
            lambda now: show(_training_table(now)),
        )


def _training_line(now: Any) -> None:
    step = now.step
    if step.number != now.num_steps and step.number % max(1, now.num_steps // 20):
        return
    cells = [f"loss {step.loss:.4f}", f"{now.tokens_per_second:,.0f} tokens/s"]
    cells += [format_bytes(step.peak_memory_bytes), f"{now.seconds_left:,.0f} s left"]
    stage = f" ({step.objective})" if now.num_stages > 1 else ""
    _Stderr().write(f"step {step.number}/{now.num_steps}{stage}: {', '.join(cells)}\n")


def _training_table(now: Any) -> Any:
    from datetime import timedelta

    from rich import box
    from rich.table import Table

    step = now.step
    table = Table(box=box.SIMPLE_HEAD)
    cells = {
        "stage": f"{step.stage}/{now.num_stages} {step.objective}",
        "step": f"{step.number}/{now.num_steps}",
        "loss": f"{step.loss:.4f}",
        **{title: f"{value:.4f}" for title, value in step.titled_losses().items()},
        "learning rate": f"{step.learning_rate:.1e}",
        "tokens/s": f"{now.tokens_per_second:,.0f}",
        "peak memory": format_bytes(step.peak_memory_bytes),
        "time left": str(timedelta(seconds=round(now.seconds_left))),
    }
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*cells.values())
    return table


@contextmanager
def _shown(what: str, amount: Any, in_words: Callable[[int, int], str]) -> Iterator[OnStage]:
    from rich.console import Console

    console = Console(file=_Stderr())  # type: ignore[arg-type]
    if console.is_terminal:
        with _bar(what, amount, console) as update:
            yield update
    else:
        with _lines(what, in_words) as lines:
            yield lines.update


@contextmanager
def _bar(what: str, amount: Any, console: Any) -> Iterator[OnStage]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        amount,
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,  # a step may take minutes
        transient=True,
    )

    def update(stage: str, done: int, total: int) -> None:
        bar.update(task, description=printable(stage, LONGEST_STAGE), completed=done, total=total)

    task = bar.add_task(printable(what, LONGEST_STAGE), total=None)
    timer = Timer(PATIENCE_SECONDS, bar.start)
    timer.start()
    try:
        yield update
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


@contextmanager
def _lines(what: str, in_words: Callable[[int, int], str]) -> Iterator["_Lines"]:
    lines = _Lines(what, in_words)
    thread = Thread(target=lines.watch, name="progress", daemon=True)
    with suppress(RuntimeError):  # no thread to be had: then no lines
        thread.start()
    try:
        yield lines
    finally:
        lines.ended.set()
        if thread.ident is not None:
            thread.join()


class _Lines:
    """Progress for a log: ``watch`` runs beside the work, which may tell nothing for long."""

    def __init__(self, what: str, in_words: Callable[[int, int], str]) -> None:
        self._now: tuple[str, int, int] | None = (what, 0, 0)
        self._in_words = in_words
        self.ended = Event()

    def update(self, stage: str, done: int, total: int) -> None:
        self._now = stage, done, total

    def pause(self) -> None:
        """Write nothing before the next update."""
        self._now = None

    def watch(self) -> None:
        """Write a line where a stage is new or has come far enough, and not too often."""
        begun = written = counted = time.monotonic()
        last = ("", 0, 0)  # what the last line said
        first = before = 0, 0  # steps done and in all, from which time is judged; and last seen
        while not self.ended.wait(TICK_SECONDS):
            at, now = self._now, time.monotonic()
            if at is None:
                written = now
                continue
            stage, *steps = at
            done, total = steps
            if total != before[1] or done < before[0]:
                first, counted = (done, total), now
            before = done, total
            quiet = now - written
            if stage != last[0]:
                due = quiet >= max(PATIENCE_SECONDS, LINE_SHARE * (now - begun))
            else:
                moved = total != last[2] or done - last[1] >= LINE_SHARE * total
                due = quiet >= LINE_SECONDS and moved
            if due:
                _Stderr().write(self._line(at, done - first[0], now - counted))
                last, written = at, now

    def _line(self, at: tuple[str, int, int], moved: int, seconds: float) -> str:
        """Args: moved: steps done in so many ``seconds``, to judge what is left by."""
        stage, done, total = at
        cells = [self._in_words(done, total)] if total > 1 else []
        if moved > 0 and done < total:
            cells.append(f"{format_seconds(seconds / moved * (total - done))} left")
        return ": ".join(filter(None, [printable(stage), ", ".join(cells)])) + "\n"


class _Stderr:
    """stderr, whose refusal (a full disk, a closed pipe) fails no work.

    As it is now: rich puts a stream of its own in its place while a bar is shown.
    """

    def __init__(self) -> None:
        self._stream: Any = sys.stderr or io.StringIO()  # None where it was closed at the start
        self.encoding = getattr(sys.stderr, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except ValueError:  # closed
            return False

    def fileno(self) -> int:
        return int(self._stream.fileno())


def _bytes(done: int, total: int) -> str:
    power = min(4, max(0, total.bit_length() - 1) // 10)
    unit, digits = ("bytes", "KiB", "MiB", "GiB", "TiB")[power], 1 if power else 0
    return f"{done / 1024**power:.{digits}f}/{total / 1024**power:.{digits}f} {unit}"


def _steps(done: int, total: int) -> str:
    return f"{done:,}/{total:,}"
