"""Loads what is inspected: a converted checkpoint, or a dense one with a pattern planned for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from hysparse_cli.convert.ledger import put_tensors
from hysparse_cli.convert.measure import INITS
from hysparse_cli.convert.plan import Plan
from hysparse_cli.convert.settle import settled_plan
from hysparse_cli.convert.swaps import swap_in_place
from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.families import family_of
from hysparse_cli.files.checkpoint import open_checkpoint
from hysparse_cli.files.source import locate
from hysparse_cli.inspect_topk.blocks import Sizes
from hysparse_cli.model.config import HysparseSpec, spec_of
from hysparse_cli.model.loading import load, load_to_measure
from hysparse_cli.model.modeling import make_sparse
from hysparse_cli.recipe import ConvertOptions, InspectOptions
from hysparse_cli.texts.calibration import text_for

OnStage = Callable[[str, int, int], None]


@dataclass
class Subject:
    """``spec`` is the checkpoint's own, or of ``plan``, which a dense model has.

    A dense model is left dense until ``convert_in_memory``.
    """

    model: Any
    tokenizer: Any
    spec: HysparseSpec
    plan: Plan | None

    @property
    def kind(self) -> Literal["converted", "dense"]:
        return "converted" if self.plan is None else "dense"

    @property
    def num_layers(self) -> int:
        return len(self.spec.pattern)

    @property
    def sizes(self) -> Sizes:
        spec = self.spec
        return Sizes(spec.block_size, spec.top_k_blocks, spec.window_tokens)

    def convert_in_memory(self, on_stage: OnStage) -> None:
        """Make a dense model what ``convert`` would write by its plan."""
        assert self.plan is not None
        options, tensors = self.plan.options, {}
        if self.plan.start_is_measured:
            rows = text_for(options, self.tokenizer, self.model.config).rows
            init = INITS[options.init]
            start = init(self.model, self.spec, rows, lambda *at: on_stage("start", *at))
            tensors = start.tensors
        make_sparse(self.model, self.spec)
        put_tensors(self.model, tensors)


def load_subject(
    checkpoint: str,
    options: InspectOptions,
    planned: ConvertOptions,
    layout_flags: Sequence[str],
    on_stage: OnStage,
) -> Subject:
    """Load ``checkpoint``; what is dense gets the layout that ``convert`` would give it.

    Args:
        layout_flags: what was asked of the layout for this run alone: for a dense model only.
    Raises: InvalidRecipe where a layout is asked for of a converted checkpoint, or nothing would be
        selected; what ``load`` and ``convert``'s plan raise.
    """
    trusted = options.trust_remote_code
    source = locate(checkpoint, trust_remote_code=trusted)
    on_stage("loading", 0, 1)
    plan = None
    if open_checkpoint(source.folder).config.get("hysparse") is None:
        planned = planned.model_copy(update={"trust_remote_code": trusted})
        with TemporaryDirectory() as scratch:  # for scores that no option names a file for
            plan = settled_plan(source, planned, Path(scratch) / "out", on_stage)
    elif layout_flags:
        raise InvalidRecipe(
            f"{checkpoint} is converted and has its layout: {', '.join(layout_flags)} would plan "
            "one for a dense model, leave it out"
        )
    if options.dtype == "auto":
        model, tokenizer, _ = load_to_measure(
            source.folder, device=options.device, trust_remote_code=trusted
        )
    else:
        model, tokenizer, _ = load(
            checkpoint, dtype=options.dtype, device=options.device, trust_remote_code=trusted
        )
    spec = plan.spec if plan is not None else spec_of(model.config)
    assert spec is not None, "a checkpoint without a spec gets a plan"
    if not spec.selects or not spec.layers.sparse_layers:
        raise InvalidRecipe(
            f"{checkpoint} has layout {spec.layout} {spec.pattern}, which selects nothing: inspect "
            "one of layout hysparse, or the dense model"
        )
    if plan is not None:
        swap_in_place(model, spec.swapped, family_of(model.config.model_type))
    return Subject(model, tokenizer, spec, plan)
