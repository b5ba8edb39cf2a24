"""Models of many families on packed rows that two processes divide, against each document alone.

    torchrun --nproc-per-node 2 -m tests.finetune.context_parallel_families

prints a JSON object: for each family, dense and HySparse, the largest difference of the loss or of
any gradient, in parts of the largest.
"""

import json
import sys
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from hysparse_cli.finetune.context_parallel import LocalBatch, make_context_parallel
from hysparse_cli.finetune.data import IGNORED, Row
from hysparse_cli.finetune.losses import next_token_sums
from hysparse_cli.finetune.run import _checkpoint_activations
from tests.model.equivalences import SPEC, TOKENS, ids
from tests.model.tiny import KINDS, TINY, dense_config, hysparse_model

STARTS = [0, 13, 33, TOKENS]  # the second document goes over the border between the processes
WINDOW = 6


def dense_model(family: str) -> Any:
    """Where the family has a sliding window, one that hides some of a document."""
    changes = {"sliding_window": WINDOW} if "sliding_window" in TINY[family] else {}
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    torch.manual_seed(0)
    config = dense_config(family, **changes)
    return AutoModelForCausalLM.from_config(config, **options).double().eval()


def packed() -> Row:
    x = ids()
    positions = torch.cat([torch.arange(end - begin) for begin, end in pairwise(STARTS)])
    labels = x.masked_fill(positions == 0, IGNORED)
    return {"input_ids": x, "position_ids": positions.expand_as(x), "labels": labels}


def alone(batch: Row) -> list[Row]:
    return [{n: x[:, begin:end] for n, x in batch.items()} for begin, end in pairwise(STARTS)]


def loss_and_gradients(model: Any, batches: list[Row], processes: Any = None) -> dict[str, Tensor]:
    model.zero_grad()
    local = [LocalBatch(batch, processes) for batch in batches]
    total = torch.stack([next_token_sums(model, batch).total for batch in local]).sum()
    total.backward()
    parameters = model.named_parameters()
    return {"": total.detach()} | {n: p.grad for n, p in parameters if p.grad is not None}


def difference(model: Any, *, trained: bool) -> float:
    expected = loss_and_gradients(model, alone(packed()))
    make_context_parallel(model, "the model", dist.get_world_size(), trained=trained)
    if trained:
        model.train()
        _checkpoint_activations(model)
    found = loss_and_gradients(model, [packed()], dist.group.WORLD)
    assert set(found) == set(expected)
    for addend in found.values():
        dist.all_reduce(addend)
    apart = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    loss, loss_apart = float(expected.pop("")), apart.pop("")
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(loss_apart / loss, max(apart.values()) / scale)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    apart = {}
    for family in KINDS:
        apart[f"{family} dense"] = difference(dense_model(family), trained=False)
        apart[f"{family} hysparse"] = difference(hysparse_model(family, SPEC), trained=True)
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(apart) + "\n")
    dist.destroy_process_group()
