"""What ``hysparse convert`` runs the dense model for: a measured start, and the damage ledger."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hysparse_cli.convert.ledger import Ledger, dense_losses, measure_ledger, put_tensors
from hysparse_cli.convert.plan import Plan
from hysparse_cli.convert.swaps import swap_in_place
from hysparse_cli.devices import out_of_memory_is
from hysparse_cli.families import family_of
from hysparse_cli.model.loading import load_to_measure
from hysparse_cli.model.modeling import make_sparse
from hysparse_cli.start.aligned import aligned
from hysparse_cli.start.copy import copy
from hysparse_cli.start.result import Init, Start
from hysparse_cli.texts.calibration import CalibrationText, text_for

INITS: dict[str, Init] = {"copy": copy, "aligned": aligned}


@dataclass(frozen=True)
class Measured:
    """``start``: None where the new tensors start from constants. ``ledger``: if asked for."""

    start: Start | None
    ledger: Ledger | None

    def table(self) -> Any:
        """Both, for people."""
        from rich.console import Group

        return Group(*(part.table() for part in (self.start, self.ledger) if part is not None))

    def as_json(self) -> dict[str, Any]:
        """What was measured, by name."""
        parts = {"start": self.start, "ledger": self.ledger}
        return {name: part.as_json() for name, part in parts.items() if part is not None}


def measured(plan: Plan, on_progress: Callable[[str, int, int], None]) -> Plan:
    """``plan`` with what its options ask for measured, the dense model loaded once.

    Args:
        on_progress: is told the stage, and steps done and in all.
    Raises: OutOfResources where the model or a row does not fit; UnreadableInput where the model
        has no tokenizer or the calibration text is missing.
    """
    options, spec = plan.options, plan.spec
    dense = load_to_measure(
        plan.source.folder,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    text = text_for(options, dense.tokenizer, dense.model.config)
    explained = _first(text, options.explain_tokens)
    line = (
        f"out of memory on {dense.model.device} with rows of {text.rows.shape[1]} tokens: lower "
        "convert.calibration_sequence_tokens, or leave out what runs the model (--init constant, "
        "no --explain)"
    )
    start = ledger = before = None
    with out_of_memory_is(line):
        if options.explain and spec.swapped:
            before = dense_losses(dense.model, explained)
        swap_in_place(dense.model, spec.swapped, family_of(dense.model.config.model_type))
        if plan.start_is_measured:
            init = INITS[options.init]
            start = init(dense.model, spec, text.rows, lambda *at: on_progress("start", *at))
        if options.explain:
            make_sparse(dense.model, spec)
            put_tensors(dense.model, start.tensors if start else {})
            ledger = measure_ledger(
                dense.model, spec, explained, lambda *at: on_progress("ledger", *at)
            )
            if before is not None:
                ledger = ledger.after_swaps(before)
    return replace(plan, measured=Measured(start, ledger))


def _first(text: CalibrationText, tokens: int) -> CalibrationText:
    kept = max(1, tokens // text.rows.shape[1])
    return CalibrationText(text.rows[:kept], text.answers[:kept])
