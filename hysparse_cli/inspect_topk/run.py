"""``hysparse inspect-topk``: what the full layers select, and how that fits those they serve."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hysparse_cli.devices import describe, out_of_memory_is
from hysparse_cli.documents import read_documents
from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.inspect_topk.report import FullLayer, Inspection, ServedLayer
from hysparse_cli.inspect_topk.stats import LayerInputs, fit_of, selection_maps
from hysparse_cli.loading import load
from hysparse_cli.logits import hidden_states
from hysparse_cli.model.config import HysparseSpec, spec_of
from hysparse_cli.recipe import InspectOptions


def inspect_topk(checkpoint: str, options: InspectOptions) -> Inspection:
    """Read one text and look at the selection of each full layer.

    The text is ``options.prompt``, or the first document of ``options.data``, cut to
    ``options.max_tokens`` and to what the model reads. ``options.lists`` gets a tensor ``layer.N``
    (T, G, K) int32 for each full layer that selects.

    Raises: InvalidRecipe where there is not one text, the checkpoint selects nothing, or
        ``options.lists`` can't be written; UnreadableInput where the text is missing or empty;
        OutOfResources.
    """
    text = _text(options)
    model, tokenizer, _ = load(checkpoint, dtype=options.dtype, device=options.device)
    spec = _spec_of(checkpoint, model.config)
    longest = min(options.max_tokens, model.config.max_position_embeddings)
    ids = tokenizer(text, verbose=False)["input_ids"][:longest]
    watch = _Watch(spec, options.seed)
    line = (
        f"out of memory on {model.device} with {len(ids)} tokens: lower inspect_topk.max_tokens or "
        "use a smaller dtype"
    )
    with out_of_memory_is(line), torch.no_grad():
        input_ids = torch.tensor([ids], device=model.device)
        hidden_states(model, input_ids, hysparse_observer=watch)
    if options.lists is not None:
        _write_lists(Path(options.lists), watch.lists, spec.block_size)
    return Inspection(
        checkpoint=checkpoint,
        options=options,
        environment=describe(model.device),
        spec=spec,
        tokens=len(ids),
        full_layers=watch.full_layers,
        served_layers=watch.served_layers,
    )


class _Watch:
    """The observer: reduces each layer to its statistics while the forward is at that layer."""

    def __init__(self, spec: HysparseSpec, seed: int):
        self.spec, self.seed = spec, seed
        self.lists: dict[str, Tensor] = {}
        self.full_layers: list[FullLayer] = []
        self.served_layers: list[ServedLayer] = []

    def __call__(
        self,
        *,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_range: Any,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        block_idx: Tensor | None,
        gates: Tensor | None,
    ) -> None:
        if block_idx is None:  # a full layer that serves nobody
            return
        spec, layout = self.spec, self.spec.layers
        inputs = LayerInputs(
            q, k, v, key_range, scale, softcap, block_idx, spec.block_size, spec.window_tokens
        )
        if layer in layout.full_layers:
            serves = list(layout.served_by(layer))
            self.lists[f"layer.{layer}"] = block_idx[0].int().cpu().contiguous()
            self.full_layers.append(FullLayer(layer, serves, selection_maps(inputs)))
            return
        # without an SWA branch there are no gates, and the block-sparse one is open
        gate_sparse, gate_window = (1.0, 0.0) if gates is None else gates.mean((0, 1, 2)).tolist()
        served = ServedLayer(
            layer, layout.server_of(layer), fit_of(inputs, self.seed), gate_sparse, gate_window
        )
        self.served_layers.append(served)


def _write_lists(path: Path, lists: dict[str, Tensor], block_size: int) -> None:
    from safetensors.torch import save_file

    try:
        save_file(lists, path, metadata={"block_size": str(block_size)})
    except (OSError, SafetensorError) as error:
        what = " ".join(str(error).split())
        raise InvalidRecipe(f"lists {path} can't be written: {what}") from None


def _text(options: InspectOptions) -> str:
    if (options.prompt is None) == (options.data is None):
        raise InvalidRecipe("inspect-topk reads one text: give either --prompt or --data")
    if options.prompt is not None:
        text: str | None = options.prompt
    else:
        assert options.data is not None
        documents = read_documents(Path(options.data), options.text_field)
        text = next((document for document in documents if document.strip()), None)
    if text is None or not text.strip():
        where = "the prompt" if options.data is None else f"data {options.data}"
        raise UnreadableInput(f"{where} holds no text: give some")
    return text


def _spec_of(checkpoint: str, config: Any) -> HysparseSpec:
    spec = spec_of(config)
    if spec is None:
        raise InvalidRecipe(
            f"{checkpoint} is a dense model, which selects nothing: convert it first "
            "(hysparse convert)"
        )
    if not spec.selects or not spec.layers.sparse_layers:
        raise InvalidRecipe(
            f"{checkpoint} has layout {spec.layout} {spec.pattern}, which selects nothing: convert "
            "the dense model with --layout hysparse first"
        )
    return spec
