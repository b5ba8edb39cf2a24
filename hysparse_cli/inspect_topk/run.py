"""Runs ``hysparse inspect-topk``: reads one text and looks at what each layer does with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hysparse_cli.devices import describe, out_of_memory_is
from hysparse_cli.errors import UnreadableInput
from hysparse_cli.inspect_topk.needle import (
    AS_IT_IS,
    FULL,
    OWN_KEYS,
    Effect,
    answer_in,
    blocks_of,
    measure_effects,
)
from hysparse_cli.inspect_topk.observe import Seen, look
from hysparse_cli.inspect_topk.reading import Reading, read
from hysparse_cli.inspect_topk.result import (
    FullLayer,
    Head,
    Inspection,
    Needle,
    NeedleBlock,
    ServedLayer,
)
from hysparse_cli.inspect_topk.selection import movements, selection_maps
from hysparse_cli.inspect_topk.subject import OnStage, Subject, load_subject
from hysparse_cli.model.logits import hidden_states
from hysparse_cli.model.state import ForwardOptions, Variation
from hysparse_cli.recipe import ConvertOptions, InspectOptions


def inspect_topk(
    checkpoint: str,
    options: InspectOptions,
    planned: ConvertOptions | None = None,
    layout_flags: Sequence[str] = (),
    on_stage: OnStage = lambda stage, done, total: None,
) -> Inspection:
    """Read one text and look at what each layer attends to, selects and is given.

    Args:
        checkpoint: a folder or hub id, converted or dense.
        planned: the layout that a dense model is looked at under; convert's defaults without it.
        layout_flags: see ``load_subject``.
        on_stage: told the stage, and steps done and in all.
    Raises: what ``load_subject`` and ``read`` raise; UnreadableInput where the model gives NaN or
        infinity; OutOfResources.
    """
    planned = planned or ConvertOptions()
    subject = load_subject(checkpoint, options, planned, layout_flags, on_stage)
    model = subject.model
    reading = read(subject.tokenizer, options, model.config.max_position_embeddings)
    line = (
        f"out of memory on {model.device} with {len(reading.ids)} tokens: lower "
        "inspect_topk.max_tokens or use a smaller dtype"
    )
    with out_of_memory_is(line):
        seen, hidden = look(subject, reading, lambda *at: on_stage("layers", *at))
        if not bool(hidden.isfinite().all()):
            raise UnreadableInput(
                f"{checkpoint} gives NaN or infinity on {reading.source}: its weights are damaged, "
                "or it needs another dtype"
            )
        needle = _needle(subject, reading, seen, hidden, on_stage)
    layout = subject.spec.layers
    return Inspection(
        checkpoint=checkpoint,
        kind=subject.kind,
        options=options,
        environment=describe(model.device),
        spec=subject.spec,
        source=reading.source,
        tokens=len(reading.ids),
        full_layers=[_full_layer(subject, *found) for found in seen.selections.items()],
        served_layers=[
            ServedLayer(layer, layout.server_of(layer), *fits, seen.branches.get(layer))
            for layer, fits in seen.fits.items()
        ],
        overlap=seen.overlap[0],
        answer_overlap=seen.overlap[1],
        needle=needle,
        selections={layer: lists.cpu() for layer, lists in seen.selections.items()},
    )


def _full_layer(subject: Subject, layer: int, selection: Tensor) -> FullLayer:
    maps = selection_maps(selection, subject.spec.block_size)
    moves = movements(selection, subject.sizes)
    heads = [Head(cells, moves[i] if moves else None) for i, cells in enumerate(maps)]
    return FullLayer(layer, list(subject.spec.layers.served_by(layer)), heads)


@torch.no_grad()
def _needle(
    subject: Subject, reading: Reading, seen: Seen, hidden: Tensor, on_stage: OnStage
) -> Needle | None:
    """Args: hidden: (1, T, hidden), of the dense model or of the converted one as it is."""
    asked, ids = reading.asked, reading.ids
    if asked is None:
        return None
    model, tokenizer, spec = subject.model, subject.tokenizer, subject.spec
    blocks = blocks_of(asked.needle, spec.block_size)
    if subject.plan is None:
        everywhere = ForwardOptions(variation=Variation(spec, frozenset(), learned=True))
        input_ids = torch.tensor([ids], device=model.device)
        hidden = hidden_states(model, input_ids, hysparse=everywhere)
    in_full = Effect(FULL, [], *answer_in(model, tokenizer, ids, asked, hidden))
    if subject.plan is not None:
        subject.convert_in_memory(on_stage)
    by_server = AS_IT_IS if subject.plan is None else OWN_KEYS
    effects = measure_effects(
        model, tokenizer, spec, ids, asked, blocks, by_server, lambda *at: on_stage("needle", *at)
    )
    return Needle(
        text=tokenizer.decode(ids[slice(*asked.needle)]),
        tokens=asked.needle,
        answer=tokenizer.decode(ids[slice(*asked.answer)]),
        answer_tokens=asked.answer,
        queries=asked.queries,
        blocks=[
            NeedleBlock(block, layers) for block, layers in zip(blocks, seen.needle, strict=True)
        ],
        effects=[in_full, *effects],
    )
