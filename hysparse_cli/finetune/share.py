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
    size = options.sequence_parallel_size
    if num_processes % size:
        raise InvalidRecipe(
            f"finetune.sequence_parallel_size is {size}, but the run has {num_processes} "
            f"process{'es' * (num_processes > 1)}: make their number a multiple of it "
            "(--nproc-per-node)"
        )
    rows, readers = options.batch_size * options.gradient_accumulation, num_processes // size
    if rows % readers:
        who = f"{num_processes} processes" if size == 1 else f"{readers} groups of {size} processes"
        raise InvalidRecipe(
            f"a step reads {rows} rows (finetune.batch_size {options.batch_size} x "
            f"gradient_accumulation {options.gradient_accumulation}), which {who} can't share "
            "evenly: make it a multiple of them"
        )
    return rows


def own_batches(step: list[Row], reader: int, readers: int, batch_size: int) -> Iterator[Row]:
    """A reader's rows of a step in equal batches of at most ``batch_size``, (B, T) each.

    Reader r of n takes rows r, r + n, ...: so a step has the same rows whatever n is. Processes
    that split rows are one reader together.
    """
    own = step[reader::readers]
    largest = next(size for size in range(batch_size, 0, -1) if len(own) % size == 0)
    for begin in range(0, len(own), largest):
        group = own[begin : begin + largest]
        yield {name: torch.stack([row[name] for row in group]) for name in group[0]}
