"""Writes each step's numbers for TensorBoard or Weights & Biases, from the first process."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hysparse_cli.errors import InvalidRecipe, writes
from hysparse_cli.finetune.distributed import World
from hysparse_cli.finetune.result import Progress
from hysparse_cli.recipe import FinetuneOptions

Log = Callable[[Progress], None]


def logs_folder(out: Path) -> Path:
    """Where the log of a run that writes ``out`` lies."""
    return out.with_name(f"{out.name}.logs")


def check_package(log_to: str | None) -> None:
    """Raises: InvalidRecipe where the package that ``log_to`` needs is not installed."""
    if log_to is not None and find_spec(log_to) is None:
        raise InvalidRecipe(
            f"finetune.log_to is {log_to!r}, but the package {log_to} is not installed: "
            f"pip install 'hysparse[logging]', or leave log_to out"
        )


@contextmanager
def step_log(out: Path, options: FinetuneOptions, resumed_at: int, world: World) -> Iterator[Log]:
    """What to tell each step of a run that goes on after step ``resumed_at``."""
    if options.log_to is None or not world.is_first:
        yield lambda now: None
        return
    folder = logs_folder(out)
    with ExitStack() as stack:
        with writes(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write = stack.enter_context(_OPEN[options.log_to](out, options, resumed_at))

        def log(now: Progress) -> None:
            write(_of(now), now.step.number)

        yield log


def _of(now: Progress) -> dict[str, float]:
    step = now.step
    return {
        "loss": step.loss,
        **step.losses,
        "learning_rate": step.learning_rate,
        "gradient_norm": step.gradient_norm,
        "tokens_per_second": now.tokens_per_second,
        "peak_memory_bytes": step.peak_memory_bytes,
        "stage": step.stage,
    }


Write = Callable[[dict[str, float], int], None]


@contextmanager
def _tensorboard(out: Path, options: FinetuneOptions, resumed_at: int) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    # steps that were made after the state was saved are made again
    writer: Any = SummaryWriter(str(logs_folder(out)), purge_step=resumed_at + 1)

    def write(values: dict[str, float], number: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, number)

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def _wandb(out: Path, options: FinetuneOptions, resumed_at: int) -> Iterator[Write]:
    import wandb

    folder = logs_folder(out)
    try:
        run: Any = wandb.init(
            project="hysparse",
            name=out.name,
            dir=str(folder),
            config=options.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise InvalidRecipe(
            f"finetune.log_to is 'wandb', which refuses: {reason}; WANDB_MODE=offline writes only "
            f"to {folder}"
        ) from None
    try:
        yield lambda values, number: run.log(values, step=number)
    finally:
        run.finish()


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb}
