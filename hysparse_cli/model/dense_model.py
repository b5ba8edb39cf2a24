"""Keeps the dense model of a command: loaded where it is first asked for, and only once."""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hysparse_cli.model.loading import Loaded


class DenseModel:
    """A dense model on its way to HySparse; ``name`` is its checkpoint's, for messages."""

    def __init__(self, name: str, load: Callable[[], "Loaded"]):
        self.name = name
        self._load = load

    @cached_property
    def loaded(self) -> "Loaded":
        """The model and its tokenizer.

        Raises: what ``load`` of loading.py does.
        """
        return self._load()

    def twin(self) -> Any:
        """Another model of the same weights, for what rewires it (sparse layers, swaps).

        Modules, hooks and config are its own; parameters and buffers are shared, and not copied.
        """
        model = self.loaded.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, shared)
