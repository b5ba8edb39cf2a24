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
    """A live table for finetuning; where stderr is no terminal, a line now and then."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _training_line
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield lambda now: live.update(_training_table(now), refresh=True)


def _training_line(now: Any) -> None:
    step = now.step
    if step.number != now.num_steps and step.number % max(1, now.num_steps // 20):
        return
    cells = [f"loss {step.loss:.4f}", f"{now.tokens_per_second:,.0f} tokens/s"]
    cells += [f"{step.peak_memory_bytes / 1e9:.2f} GB", f"{now.seconds_left:,.0f} s left"]
    stage = f" ({step.objective})" if now.num_stages > 1 else ""
    sys.stderr.write(f"step {step.number}/{now.num_steps}{stage}: {', '.join(cells)}\n")


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
        **{name: f"{value:.4f}" for name, value in step.parts().items()},
        "learning rate": f"{step.learning_rate:.1e}",
        "tokens/s": f"{now.tokens_per_second:,.0f}",
        "peak memory": f"{step.peak_memory_bytes / 1e9:.2f} GB",
        "time left": str(timedelta(seconds=round(now.seconds_left))),
    }
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*cells.values())
    return table


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
