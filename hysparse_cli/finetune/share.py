"""Which rows of a step a process reads."""

from collections.abc import Iterator

import torch

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.finetune.data import Row
from hysparse_cli.recipe import FinetuneOptions


def rows_of_step(options: FinetuneOptions, num_processes: int) -> int:
    """How many rows a step reads, in all processes together.

    Raises: InvalidRecipe where they can't be shared out evenly.
    """
    rows = options.batch_size * options.gradient_accumulation
    if rows % num_processes:
        raise InvalidRecipe(
            f"a step reads {rows} rows (finetune.batch_size {options.batch_size} x "
            f"gradient_accumulation {options.gradient_accumulation}), which {num_processes} "
            "processes can't share evenly: make it a multiple of them"
        )
    return rows


def own_batches(step: list[Row], rank: int, num_processes: int, batch_size: int) -> Iterator[Row]:
    """The process's rows of a step in equal batches of at most ``batch_size``, (B, T) each.

    Process r of n takes rows r, r + n, ...: so a step has the same rows whatever n is.
    """
    own = step[rank::num_processes]
    largest = next(size for size in range(batch_size, 0, -1) if len(own) % size == 0)
    for begin in range(0, len(own), largest):
        group = own[begin : begin + largest]
        yield {name: torch.stack([row[name] for row in group]) for name in group[0]}
