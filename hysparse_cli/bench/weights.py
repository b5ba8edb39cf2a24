"""Makes a subject's model, of its own weights or random ones, on the device only in its turn."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hysparse_cli.bench.subjects import Subject
from hysparse_cli.convert.shapes import dense_config
from hysparse_cli.devices import out_of_memory_is
from hysparse_cli.files.foreign import without_kernels
from hysparse_cli.model.attention import DENSE_NAME
from hysparse_cli.model.config import MODEL_TYPE
from hysparse_cli.model.loading import load
from hysparse_cli.model.registration import HySparseConfig

STD = 0.02  # of random matrices, as most models begin with


class Weights:
    """``model`` on ``device``; ``park`` frees a GPU of it, and ``restore`` brings it back.

    Random matrices are drawn anew each time, the same ones; loaded weights wait on the CPU.
    """

    def __init__(
        self,
        subject: Subject,
        dtype: str,
        device: torch.device,
        seed: int,
        *,
        trust_remote_code: bool = False,
    ):
        self.device, self.seed = device, seed
        self.loaded = subject.checkpoint is not None
        with out_of_memory_is(f"{subject.name} does not fit on {device}"):
            if subject.checkpoint is not None:
                self.model = load(
                    subject.checkpoint,
                    dtype=dtype,
                    device="cpu",
                    trust_remote_code=trust_remote_code,
                ).model
                if subject.is_dense:
                    self.model.set_attn_implementation(DENSE_NAME)
                _move_buffers(self.model, device)
            else:
                self.model = random_model(subject, dtype, device, seed)
        self._there = False
        self._waiting: dict[str, Tensor] = {}
        if self.loaded:
            self._waiting = {name: p.data for name, p in self.model.named_parameters()}
        self._shapes = {name: p.shape for name, p in self.model.named_parameters()}

    def restore(self) -> None:
        if self._there:
            return
        self._there = True
        chance = torch.Generator(self.device).manual_seed(self.seed)
        for name, parameter in self.model.named_parameters():
            if self.loaded:
                parameter.data = self._waiting[name].to(self.device)
            elif parameter.shape != self._shapes[name]:
                drawn = parameter.data.new_empty(self._shapes[name])
                parameter.data = drawn.normal_(std=STD, generator=chance)

    def park(self) -> None:
        """Nothing on a CPU, whose memory is where weights wait."""
        self._there = False
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            if self.device.type == "cpu":
                continue
            if self.loaded:
                parameter.data = self._waiting[name]
            elif parameter.dim() > 1:  # norms and biases are small, and no random numbers
                parameter.data = parameter.data.new_empty(0)


def random_model(subject: Subject, dtype: str, device: torch.device, seed: int) -> Any:
    """A model of the subject's shape in eval mode, drawn where it is to run."""
    torch.manual_seed(seed)
    config = config_of(subject)
    auto: Any = AutoModelForCausalLM
    wanted = torch_dtype(subject, dtype)
    attention = {"attn_implementation": DENSE_NAME} if subject.is_dense else {}
    with torch.device(device):
        model = auto.from_config(config, dtype=wanted, trust_remote_code=False, **attention)
        return model.eval()


def config_of(subject: Subject) -> Any:
    """The transformers config of a subject.

    Raises: UnreadableInput where transformers does not accept a value.
    """
    if subject.config["model_type"] == MODEL_TYPE:
        return HySparseConfig.from_dict(without_kernels(subject.config))
    return dense_config(subject.config, f"the config of {subject.name}")


def torch_dtype(subject: Subject, dtype: str) -> torch.dtype:
    """ "auto" is what the config says, or bfloat16."""
    named = subject.config.get("dtype") or subject.config.get("torch_dtype") or "bfloat16"
    found: torch.dtype = getattr(torch, named if dtype == "auto" else dtype)
    return found


def _move_buffers(model: Any, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
