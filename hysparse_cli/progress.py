"""What a command that takes a while shows meanwhile, on stderr: a bar on a terminal, else lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_SECONDS = 2.0


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr for work that takes a while; tell it bytes done and in all."""
    from rich.progress import DownloadColumn

    with _bar(what, DownloadColumn(binary_units=True)) as update:
        yield lambda done, total: update(completed=done, total=total)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar as above for work in stages; tell it the stage, and the steps done and in all."""
    from rich.progress import MofNCompleteColumn

    with _bar("loading", MofNCompleteColumn()) as update:
        yield lambda stage, done, total: update(description=stage, completed=done, total=total)


@contextmanager
def training_steps() -> Iterator[Callable[[Any], None]]:
    """A bar for finetuning; where stderr is no terminal, a line now and then."""

    with stages() as advance:

        def on_step(now: Any) -> None:
            number, speed = now.step.number, f"{now.tokens_per_second:,.0f} tokens/s"
            loss = f"loss {now.step.loss:.4f}"
            advance(f"{loss}, {speed}", number, now.num_steps)
            due = number == now.num_steps or number % max(1, now.num_steps // 20) == 0
            if due and not sys.stderr.isatty():
                left = f"{now.seconds_left:,.0f} s left"
                sys.stderr.write(f"step {number}/{now.num_steps}: {loss}, {speed}, {left}\n")

        yield on_step


@contextmanager
def _bar(what: str, amount: Any) -> Iterator[Callable[..., None]]:
    from functools import partial
    from threading import Timer

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        amount,
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,  # a step may take minutes
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(what, total=None)
    timer = Timer(PATIENCE_SECONDS, bar.start)
    timer.start()
    try:
        yield partial(bar.update, task)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
