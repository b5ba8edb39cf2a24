"""Which layers need far context, and which attention should therefore sit in the full layers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hysparse_cli.evaluate.perplexity import token_losses
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.modeling import make_sparse
from hysparse_cli.model.state import ForwardOptions, Variation
from hysparse_cli.pattern import FULL, SPARSE
from hysparse_cli.texts.calibration import CalibrationText

# The residual stream changes from layer to layer: attention that moves far reads another one.
MOST_LAYERS_APART = 3
LEAST_GAIN = 0.1  # of the greatest need: less is not worth a move


def choose_swaps(need: Sequence[float], pattern: str) -> tuple[tuple[int, int], ...]:
    """Put the attention that needs far context most into full layers, as near as may be.

    In falling order of need, each sparse layer swaps with the nearest full layer that has not
    swapped yet, is at most MOST_LAYERS_APART away, needs less by LEAST_GAIN of the greatest need,
    and is not layer 0, which reads the embeddings.
    """
    least = LEAST_GAIN * max(need)
    free = [layer for layer, kind in enumerate(pattern) if kind == FULL and layer > 0]
    pairs = []
    sparse = [layer for layer, kind in enumerate(pattern) if kind == SPARSE]
    for layer in sorted(sparse, key=lambda layer: -need[layer]):
        near = [
            full
            for full in free
            if abs(full - layer) <= MOST_LAYERS_APART and need[layer] - need[full] > least
        ]
        if near:
            full = min(near, key=lambda full: (abs(full - layer), need[full]))
            free.remove(full)
            pairs.append((full, layer))
    return tuple(sorted(pairs))


def measure_need(
    model: Any,
    text: CalibrationText,
    window_tokens: int,
    on_progress: Callable[[int, int], None],
) -> tuple[float, ...]:
    """The ``need`` of each layer (see result.Swaps); layer 0's is 0, as it always stays full.

    Args:
        model: dense; it is made sparse in place, for good.
        on_progress: told forwards done, and of how many: rows x layers.
    """
    num_layers = model.config.num_hidden_layers
    spec = HysparseSpec(
        FULL + SPARSE * (num_layers - 1), layout="hybrid-swa", window_tokens=window_tokens
    )
    make_sparse(model, spec)
    answers = text.answers[:, 1:]
    counted = answers if bool(answers.any()) else torch.ones_like(answers)
    sums = [0.0] * num_layers
    for r, row in enumerate(text.rows):
        for layer in range(num_layers):  # layer 0 stands for none
            on_progress(r * num_layers + layer, len(text.rows) * num_layers)
            alone = Variation(spec, frozenset({layer} if layer else ()), learned=False)
            options = ForwardOptions(variation=alone)
            losses = token_losses(model, row[None].to(model.device), hysparse=options)[0]
            sums[layer] += float(losses.cpu()[counted[r]].double().sum())
    on_progress(len(text.rows) * num_layers, len(text.rows) * num_layers)
    asked = int(counted.sum())
    return tuple((total - sums[0]) / asked for total in sums)
