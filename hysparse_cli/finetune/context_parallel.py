"""Gives a process its tokens of each batch, all or a part of every row, and models that see them.

model/context_parallel.py has the attention.
"""

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.families import family_of
from hysparse_cli.finetune.data import IGNORED, Row
from hysparse_cli.model.config import spec_of
from hysparse_cli.model.context_parallel import CONTEXT_PARALLEL, ContextParallelRows
from hysparse_cli.model.kv_cache import kv_cache_of
from hysparse_cli.model.logits import hidden_states, layer_states
from hysparse_cli.model.state import ForwardOptions

_LENGTH_DEPENDENT = ("dynamic", "longrope")
_SEES_OTHER_DOCUMENTS = ("gpt_oss",)  # transformers makes its mask without position_ids


class LocalBatch:
    """The tokens of a packed batch that this process computes.

    targets: (B, t) the token after each, IGNORED where none is predicted; after the last local
    token it is the next process's first. num_targets: (B,) of the whole rows. total: see
    ``ContextParallelRows``.

    Args:
        batch: what ``PackedRows`` yields, (B, T) each, the same in all of ``processes``.
        processes: the context-parallel processes, this one among them, or None.
    """

    def __init__(self, batch: Row, processes: ProcessGroup | None = None):
        self.rows = ContextParallelRows(batch["position_ids"], processes)
        targets = pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        self.num_targets = (targets != IGNORED).sum(1)
        self.input_ids, self.targets = self._local(batch["input_ids"]), self._local(targets)
        self.total = self.rows.total

    def last_states(self, model: Any, **options: Any) -> Tensor:
        """(B, t, hidden) after the last layer; all processes must ask for it."""
        return hidden_states(model, self.input_ids, **self._inputs(model), **options)

    def states(self, model: Any) -> list[Tensor]:
        """(B, t, hidden) after each layer; all processes must ask for them."""
        return layer_states(model, self.input_ids, **self._inputs(model))

    def _inputs(self, model: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = {"position_ids": self._local(self.rows.position_ids)}
        if model.config._attn_implementation == CONTEXT_PARALLEL:
            inputs["hysparse"] = ForwardOptions(rows=self.rows)
        return inputs

    def _local(self, whole: Tensor) -> Tensor:
        return self.rows.local(whole, 1)


def prepare_attention(model: Any, name: str, num_processes: int, *, trained: bool) -> None:
    """``make_context_parallel`` for several processes, or a dense model that mixes documents."""
    dense = spec_of(model.config) is None
    if num_processes > 1 or (dense and model.config.model_type in _SEES_OTHER_DOCUMENTS):
        make_context_parallel(model, name, num_processes, trained=trained)


def make_context_parallel(model: Any, name: str, num_processes: int, *, trained: bool) -> None:
    """Let ``model``, dense or converted, see rows whose tokens ``num_processes`` divide.

    Args:
        trained: whether the model is, and so drops out what its config.json says.
    Raises: InvalidRecipe where it can't be right; UnsupportedModel where the family is not known.
    """
    config = model.config
    family_of(config.model_type)
    problem = None
    num_kv_heads = kv_cache_of(config).num_kv_heads
    rope = getattr(config, "rope_parameters", None) or {}
    if num_kv_heads % num_processes:
        problem = (
            f"{name} has {num_kv_heads} KV heads, which so many processes can't share evenly: use "
            "a divisor of them"
        )
    elif trained and getattr(config, "attention_dropout", None):
        problem = (
            f"{name} drops out {config.attention_dropout} of its attention (attention_dropout in "
            "its config.json), which attention over split rows does not: set it to 0, or leave "
            "this out"
        )
    elif rope.get("rope_type") in _LENGTH_DEPENDENT:
        problem = (
            f"{name} rotates by the length of a row ({rope['rope_type']} in its config.json), of "
            "which a process sees only a part: leave this out"
        )
    if problem is not None:
        raise InvalidRecipe(f"finetune.sequence_parallel_size is {num_processes}, but {problem}")
    config._attn_implementation = CONTEXT_PARALLEL
