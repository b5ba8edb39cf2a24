"""Runs the dense model for what only it can tell: full layers, swaps, the start, and the damage.

One ``LazyModel`` serves a whole command. It is loaded where something is first measured. What makes
it sparse, or swaps its layers, gets a twin of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hysparse_cli.convert.dense import DenseCheckpoint
from hysparse_cli.convert.ledger import Ledger, dense_losses, measure_ledger, put_tensors
from hysparse_cli.convert.plan import Plan, plan
from hysparse_cli.convert.swaps import swap_in_place
from hysparse_cli.devices import out_of_memory_is
from hysparse_cli.files.source import Source
from hysparse_cli.model.loading import LazyModel, load_to_measure
from hysparse_cli.model.modeling import make_sparse
from hysparse_cli.placement.run import choose_attention, select
from hysparse_cli.recipe import ConvertOptions
from hysparse_cli.start.aligned import aligned
from hysparse_cli.start.copy import copy
from hysparse_cli.start.result import Init, Start
from hysparse_cli.texts.calibration import CalibrationText, text_for

INITS: dict[str, Init] = {"copy": copy, "aligned": aligned}
OnStage = Callable[[str, int, int], None]  # the stage, and steps done and in all


@dataclass(frozen=True)
class Measured:
    """``start``: None where the new tensors start from constants. ``ledger``: if asked for."""

    start: Start | None
    ledger: Ledger | None

    def as_json(self) -> dict[str, Any]:
        """What was measured, by name."""
        parts = {"start": self.start, "ledger": self.ledger}
        return {name: part.as_json() for name, part in parts.items() if part is not None}


def dense_model(source: Source, options: ConvertOptions) -> LazyModel:
    """The dense model of ``source``, in the dtype and on the device that it is measured in."""
    load = partial(
        load_to_measure,
        str(source.folder),
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    return LazyModel(source.name, load)


def decide(
    dense: DenseCheckpoint,
    options: ConvertOptions,
    model: LazyModel,
    out: Path,
    on_stage: OnStage,
) -> Plan:
    """The plan with the pattern that the strategy chooses and the swaps that "auto" chooses.

    Args:
        model: of ``dense``; it is loaded only where an option lets it decide.
        out: where the checkpoint will be; what a strategy measures is kept in OUT.scores.json,
            unless ``options`` names a file.
    Raises: UnreadableInput, UnsupportedModel, InvalidRecipe; OutOfResources where the model has to
        be run and does not fit.
    """
    planned = plan(dense, options)
    if options.measures:
        scores = Path(options.scores or out.with_name(f"{out.name}.scores.json"))
        uniform = planned.spec.layers
        selection = select(dense.checkpoint, options, uniform, scores, model, on_stage)
        planned = plan(dense, options, selection)
    if options.swap_attention == "auto":
        swaps = choose_attention(model, options, planned.spec, on_stage)
        planned = plan(dense, options, planned.selection, swaps)
    return planned


def measure(plan: Plan, model: LazyModel, on_stage: OnStage) -> Plan:
    """``plan`` with the start and the ledger that its options ask for.

    Args:
        model: of the checkpoint that ``plan`` converts. A start that changes dense weights leaves
            them changed in it.
    Raises: OutOfResources where the model or a row does not fit; UnreadableInput where the model
        has no tokenizer or the calibration text is missing.
    """
    options, spec = plan.options, plan.spec
    dense = model.loaded.model
    text = text_for(options, model.loaded.tokenizer, dense.config)
    explained = _first(text, options.explain_tokens)
    line = (
        f"out of memory on {dense.device} with rows of {text.rows.shape[1]} tokens: lower "
        "convert.calibration_sequence_tokens, or leave out what runs the model (--init constant, "
        "no --explain)"
    )
    start = ledger = before = None
    with out_of_memory_is(line):
        if options.explain and spec.swapped:
            before = dense_losses(dense, explained)
        twin = model.twin()
        swap_in_place(twin, spec.swapped, plan.dense.family)
        if plan.start_is_measured:
            init = INITS[options.init]
            start = init(twin, spec, text.rows, lambda *at: on_stage("start", *at))
        if options.explain:
            make_sparse(twin, spec)
            put_tensors(twin, start.tensors if start else {})
            ledger = measure_ledger(twin, spec, explained, lambda *at: on_stage("ledger", *at))
            if before is not None:
                ledger = ledger.after_swaps(before)
    return replace(plan, measured=Measured(start, ledger))


def _first(text: CalibrationText, tokens: int) -> CalibrationText:
    kept = max(1, tokens // text.rows.shape[1])
    return CalibrationText(text.rows[:kept], text.answers[:kept])
