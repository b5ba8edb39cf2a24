"""What is trained: a group of parameters, each with a float32 copy where it has fewer bits."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.families import family_of
from hysparse_cli.model.config import spec_of

_NEW = ".hysparse."


def select_trainable(model: Any, group: str) -> dict[str, nn.Parameter]:
    """Let gradients reach the parameters of ``group`` only, and return them by name.

    Args:
        group: "all"; "attention": everything below an attention module; "sparse-attention": that
            of sparse layers; "new": what the conversion added.
    Raises: InvalidRecipe where the model has none; UnsupportedModel where its family's attention is
        not known.
    """
    belongs = _GROUPS[group](model)
    chosen = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(belongs(name))
        if parameter.requires_grad:
            chosen[name] = parameter
    if not chosen:
        raise InvalidRecipe(
            f"finetune.trainable is {group!r}, but the model has no such parameters: it is dense, "
            "or has only full layers; use 'all' or 'attention'"
        )
    return chosen


def _all(model: Any) -> Callable[[str], bool]:
    return lambda name: True


def _attention(model: Any) -> Callable[[str], bool]:
    return _below_attention(model, range(model.config.num_hidden_layers))


def _sparse_attention(model: Any) -> Callable[[str], bool]:
    spec = spec_of(model.config)
    return _below_attention(model, () if spec is None else spec.layers.sparse_layers)


def _below_attention(model: Any, layers: Iterable[int]) -> Callable[[str], bool]:
    path = family_of(model.config.model_type).attention
    places = tuple(f"{path.format(layer=layer)}." for layer in layers)
    return lambda name: name.startswith(places)


def _new(model: Any) -> Callable[[str], bool]:
    return lambda name: _NEW in name


_GROUPS: dict[str, Callable[[Any], Callable[[str], bool]]] = {
    "all": _all,
    "attention": _attention,
    "sparse-attention": _sparse_attention,
    "new": _new,
}


class MasterWeights:
    """The float32 weights that the optimiser updates.

    A bfloat16 weight can't take a step below 1/256 of itself, so such steps would be lost.
    Gradients too are added up in float32. A parameter that is float32 already is its own master.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters
        self.masters = {name: _master(parameter) for name, parameter in parameters.items()}

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups: matrices decay; vectors and sinks, which are biases, do not."""
        decays = {n: p.dim() > 1 and not n.endswith(".sinks") for n, p in self.masters.items()}
        return [
            {
                "params": [p for n, p in self.masters.items() if decays[n] is decayed],
                "weight_decay": weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]

    def take_gradients(self) -> None:
        """Move what a backward pass left in the parameters over to the masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])

    def state_dict(self) -> dict[str, Tensor]:
        return {name: master.detach() for name, master in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(state[name])
        self.publish()


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())
