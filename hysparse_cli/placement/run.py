"""Places full layers, and the attention in them, by what is measured on the dense model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hysparse_cli import pattern as patterns
from hysparse_cli.devices import describe, out_of_memory_is
from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.files.checkpoint import Checkpoint
from hysparse_cli.files.output import prepare_file
from hysparse_cli.model.config import HysparseSpec
from hysparse_cli.model.loading import LazyModel
from hysparse_cli.pattern import Pattern
from hysparse_cli.placement.far_context import choose_swaps, measure_need
from hysparse_cli.placement.overlap import measure_overlap
from hysparse_cli.placement.result import Selection, Swaps
from hysparse_cli.placement.scores import SIZES, TEXT, Scores, fingerprint, read_scores
from hysparse_cli.placement.search import path_steps
from hysparse_cli.placement.strategies import STRATEGIES, Strategy
from hysparse_cli.placement.variants import Variants
from hysparse_cli.recipe import ConvertOptions
from hysparse_cli.texts.calibration import calibration_text, sequence_tokens_of, text_for

OnStage = Callable[[str, int, int], None]


def select(
    checkpoint: Checkpoint,
    options: ConvertOptions,
    uniform: Pattern,
    path: Path,
    model: LazyModel,
    on_stage: OnStage,
) -> Selection:
    """Place as many full layers as ``uniform`` has, as ``options.strategy`` says.

    Args:
        uniform: the uniform pattern.
        path: the score file: what it lacks is measured and added, the rest is not measured again.
        model: of ``checkpoint``; it is loaded only where something is measured.
    Raises: InvalidRecipe, UnreadableInput, UnsupportedModel, OutOfResources.
    """
    assert options.strategy is not None
    strategy = STRATEGIES[options.strategy]
    if options.scores is not None and not path.parent.is_dir():
        raise InvalidRecipe(f"scores {path}: there is no folder {path.parent}, make it first")
    identity = fingerprint(checkpoint)
    scores = read_scores(path, identity, options) if path.exists() else None
    if scores is None or (strategy.path is not None and options.strategy not in scores.paths):
        prepare_file(path)
        on_stage("loading", 0, 1)
        _measure(model, options, strategy, identity, scores, on_stage).write(path)
        scores = read_scores(path, identity, options)  # rounded as every later run will find it
    pattern = strategy.pick(scores, len(uniform.full_layers))
    return Selection(
        strategy=options.strategy,
        pattern=pattern,
        score=strategy.score(scores, pattern),
        uniform_pattern=uniform.pattern,
        uniform_score=strategy.score(scores, uniform.pattern),
        quantity=strategy.quantity,
        higher_is_better=strategy.higher_is_better,
        scores_file=str(path),
    )


def choose_attention(
    model: LazyModel, options: ConvertOptions, spec: HysparseSpec, on_stage: OnStage
) -> Swaps:
    """Choose which attention to put into the full layers of ``spec`` (see far_context.py).

    Raises: UnreadableInput, UnsupportedModel, OutOfResources.
    """
    on_stage("loading", 0, 1)
    dense = model.loaded.model
    text = text_for(options, model.loaded.tokenizer, dense.config)
    with out_of_memory_is(_out_of_memory(dense.device, text.rows)):
        need = measure_need(
            model.twin(),
            text,
            spec.window_tokens,
            lambda done, total: on_stage("far context", done, total),
        )
    _check_finite(need, model.name)
    return Swaps(choose_swaps(need, spec.layers), need)


def _measure(
    model: LazyModel,
    options: ConvertOptions,
    strategy: Strategy,
    identity: str,
    known: Scores | None,
    on_stage: OnStage,
) -> Scores:
    """What ``strategy`` needs, added to what is ``known``, on the text that was used before."""
    dense = model.loaded.model
    sizes = {name: getattr(options, name) for name in SIZES}
    text = _text(options, dense.config) if known is None else known.text
    rows = calibration_text(
        model.loaded.tokenizer,
        data=None if text["calibration"] is None else Path(text["calibration"]),
        text_field=text["calibration_text_field"],
        tokens=text["calibration_tokens"],
        sequence_tokens=text["calibration_sequence_tokens"],
        seed=text["seed"],
    ).rows
    num_layers = dense.config.num_hidden_layers
    spec = HysparseSpec(patterns.uniform(num_layers, num_layers).pattern, **sizes)
    with out_of_memory_is(_out_of_memory(dense.device, rows)):
        fitted = measure_overlap(
            dense,
            rows,
            spec,
            text["seed"],
            lambda done, total: on_stage("watching layers", done, total),
        )
        _check_finite(fitted.overlap.importance, model.name)
        scores = known or Scores(
            model=identity,
            sizes=sizes,
            text=text,
            environment=describe(dense.device),
            overlap=fitted.overlap,
        )
        if strategy.path is not None:
            variants = Variants(model.twin(), rows, spec, fitted.gate_logits)
            _search(options, strategy, variants, scores, num_layers, on_stage)
    return scores


def _check_finite(by_layer: Sequence[float], name: str) -> None:
    if not all(map(math.isfinite, by_layer)):
        raise UnreadableInput(
            f"{name} gives NaN or infinity on the calibration text: its weights are damaged, or it "
            "needs another dtype"
        )


def _search(
    options: ConvertOptions,
    strategy: Strategy,
    variants: Variants,
    scores: Scores,
    num_layers: int,
    on_stage: OnStage,
) -> None:
    """Walk the strategy's path, and measure every uniform pattern, whatever will be asked for."""
    uniform = [patterns.from_ratio(f"1:{n}", num_layers) for n in range(num_layers)]
    uniform += [patterns.uniform(n, num_layers) for n in range(min(2, num_layers), num_layers + 1)]
    letters = {pattern.pattern for pattern in uniform}
    total, done = (path_steps(num_layers) + len(letters)) * len(variants.rows), 0

    def on_row() -> None:
        nonlocal done
        done += 1
        on_stage(f"{options.strategy}: patterns", done, max(done, total))

    def cost(pattern: str) -> float:
        if pattern not in scores.losses:
            scores.losses[pattern] = asdict(variants.quality(pattern, on_row))
        return scores.losses[pattern][strategy.metric]

    assert strategy.path is not None and options.strategy is not None
    scores.paths[options.strategy] = strategy.path(num_layers, cost)
    for pattern in sorted(letters):
        cost(pattern)


def _text(options: ConvertOptions, config: Any) -> dict[str, Any]:
    """The options of the calibration text, resolved for this model."""
    length = sequence_tokens_of(options, config)
    return {name: getattr(options, name) for name in TEXT} | {"calibration_sequence_tokens": length}


def _out_of_memory(device: Any, rows: Any) -> str:
    return (
        f"out of memory on {device} with rows of {rows.shape[1]:,} tokens: lower "
        "convert.calibration_sequence_tokens, or measure on another device"
    )
