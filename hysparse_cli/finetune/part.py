"""The tokens of a batch that a process computes: all, or its share where rows are split."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from hysparse_cli.finetune.data import IGNORED, Row
from hysparse_cli.model.context_parallel import SPLIT, SplitRows
from hysparse_cli.model.logits import hidden_states, layer_states
from hysparse_cli.model.state import ForwardOptions

Processes = dist.ProcessGroup | None  # that split their rows, this one among them


class Part:
    """One process's part of a packed batch.

    targets: (B, t) the token after each, IGNORED where none is predicted; of the last of a part it
    is the next part's first. num_targets: (B,) of the whole rows. total: see ``SplitRows``.

    Args:
        batch: what ``PackedRows`` yields, (B, T) each, the same in all of ``processes``.
    """

    def __init__(self, batch: Row, processes: Processes = None):
        self.rows = SplitRows(batch["position_ids"], processes)
        targets = pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        self.num_targets = (targets != IGNORED).sum(1)
        self.input_ids, self.targets = self._of(batch["input_ids"]), self._of(targets)
        self.total = self.rows.total

    def last_states(self, model: Any, **options: Any) -> Tensor:
        """(B, t, hidden) after the last layer; all processes must ask for it."""
        return hidden_states(model, self.input_ids, **self._inputs(model), **options)

    def states(self, model: Any) -> list[Tensor]:
        """(B, t, hidden) after each layer; all processes must ask for them."""
        return layer_states(model, self.input_ids, **self._inputs(model))

    def _inputs(self, model: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = {"position_ids": self._of(self.rows.position_ids)}
        if model.config._attn_implementation == SPLIT:
            inputs["hysparse"] = ForwardOptions(rows=self.rows)
        return inputs

    def _of(self, whole: Tensor) -> Tensor:
        return self.rows.share(whole, 1)
