"""Shards a model and its teacher with FSDP2: float32 weights, computed with in fewer bits.

The same in one process, where FSDP2 leaves its collectives out: it took a twentieth more time than
the plain model on a CPU in float32, less than the plain model with float32 copies of its weights in
bfloat16, and holds each layer's bfloat16 weights only while they are used.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hysparse_cli.finetune.context_parallel import LocalBatch
from hysparse_cli.finetune.data import Row
from hysparse_cli.finetune.distributed import World
from hysparse_cli.finetune.objectives import OBJECTIVES
from hysparse_cli.finetune.trainable import select_trainable
from hysparse_cli.recipe.finetune import Stage


class ObjectiveModule(nn.Module):
    """A stage's objective as one module, which makes it FSDP2's root.

    An objective calls the decoder and the head of a model by themselves (model/logits.py), so that
    the model can't be the root: embeddings, the last norm and the head must be there for all of it.
    ``processes`` are the context-parallel ones, this one among them.
    """

    def __init__(self, model: Any, teacher: Any | None, processes: ProcessGroup | None):
        super().__init__()
        self.model, self.teacher, self.processes = model, teacher, processes

    def forward(self, batch: Row, stage: Stage) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised, a scalar, and without gradient all that was measured, it as "loss"."""
        objective = OBJECTIVES[stage.objective]
        local = LocalBatch(batch, self.processes)
        total, measured = objective(self.model, local, self.teacher, stage)
        sums = {"loss": total} | measured
        return total.clone(), {name: value.detach() for name, value in sums.items()}


def sharded(
    model: Any, teacher: Any | None, trained: Iterable[str], world: World
) -> ObjectiveModule:
    """Spread a model, and with several processes its teacher, over ``world``'s devices.

    A bfloat16 weight can't take a step below 1/256 of itself, so weights that are trained are
    float32 from here on; forward and backward are computed in the dtype the model came in, and
    gradients are added up in float32.

    Args:
        model: on the CPU or the world's device, as is ``teacher``.
        trained: names of the parameters that any stage trains.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=model.dtype if model.dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # it would copy the state of a HySparse forward at each layer
    )
    names = set(trained)
    masters = {parameter for name, parameter in model.named_parameters() if name in names}
    module = ObjectiveModule(model, teacher, world.context_parallel)
    replicated: set[nn.Parameter] = set()
    if teacher is not None and world.size == 1:
        replicated = set(teacher.to(world.device).parameters())
    layers = [
        *_layers(model),
        *(_layers(teacher) if teacher is not None and not replicated else []),
    ]
    for unit in (*layers, module):
        for parameter in masters.intersection(unit.parameters()):
            parameter.data = parameter.data.float()
            masters.remove(parameter)
        fully_shard(unit, mesh=world.mesh, mp_policy=policy, ignored_params=replicated)
    return module


def train_only(module: ObjectiveModule, trainable: str) -> dict[str, nn.Parameter]:
    """``select_trainable`` for a sharded model."""
    chosen = select_trainable(module.model, trainable)
    for unit in (child for child in module.modules() if isinstance(child, FSDPModule)):
        unit.unshard()  # each parameter has a second one, which FSDP2 puts in its place meanwhile
        for name, parameter in module.model.named_parameters():
            parameter.requires_grad_(name in chosen)
        unit.reshard()
    return chosen


def whole(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters put together again, one at a time; all processes must ask for the same."""
    for name, parameter in parameters:
        value = parameter.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value


def _layers(model: Any) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]
