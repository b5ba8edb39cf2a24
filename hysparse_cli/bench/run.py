"""The sweep: every checkpoint at every context and batch, taking turns."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hysparse_cli.bench.clock import Timing, timed
from hysparse_cli.bench.decode import decode
from hysparse_cli.bench.prefill import prefill
from hysparse_cli.bench.result import Bench, Measurement, Subject
from hysparse_cli.devices import describe, is_out_of_memory
from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.kv_cache import held_kv_bytes, kv_cache_of
from hysparse_cli.loading import load
from hysparse_cli.model.config import spec_of
from hysparse_cli.recipe import BenchOptions
from hysparse_kernels.backends import Call, choose

OPS = ("full_attention", "sparse_layer_attention", "sliding_window_attention")

Progress = Callable[[str, int, int], None]


def bench(
    checkpoint: str,
    options: BenchOptions,
    on_progress: Progress = lambda what, done, total: None,
) -> Bench:
    """Measure ``checkpoint`` beside ``options.against``, on random tokens.

    At each context and batch the checkpoints take turns, once to warm up and then ``repeat`` times,
    so that a machine that slows down slows them all. Where memory runs out, a row says so.

    Raises: InvalidRecipe where a context is longer than a model reads; UnreadableInput,
        UnsupportedModel or OutOfResources where a checkpoint can't be loaded.
    """
    checkpoints = list(dict.fromkeys([checkpoint, *options.against]))
    models = {}
    for name in checkpoints:
        models[name] = load(name, dtype=options.dtype, device=options.device).model
        _check_context(name, models[name].config, options)
    subjects = [_subject(name, model) for name, model in models.items()]
    cells = [(context, batch) for context in options.context for batch in options.batch]
    rows: list[Measurement] = []
    for done, (context, batch) in enumerate(cells):
        on_progress(f"context {context:,}, batch {batch:,}", done, len(cells))
        rows += _measure_cell(models, context, batch, options)
    return Bench(options, describe(models[checkpoint].device), subjects, rows)


def _measure_cell(
    models: dict[str, Any], context: int, batch: int, options: BenchOptions
) -> list[Measurement]:
    """One row a model; the turns go round the models, the first one unmeasured."""
    samples: dict[str, list[tuple[float, float, int]] | None] = {name: [] for name in models}
    for turn in range(1 + options.repeat):
        for name, model in models.items():
            taken = samples[name]
            if taken is None:
                continue
            try:
                sample = _run_once(model, context, batch, options)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                samples[name] = None
                sample = None
            if sample is None:
                _free_memory()
            elif turn:
                taken.append(sample)
    return [_row(name, models[name], context, batch, samples[name]) for name in models]


def _run_once(
    model: Any, context: int, batch: int, options: BenchOptions
) -> tuple[float, float, int]:
    """TTFT and TPOT in ms, and the bytes the cache held between the two."""
    chance = torch.Generator().manual_seed(options.seed)
    shape = (batch, context)
    input_ids = torch.randint(model.config.vocab_size, shape, generator=chance).to(model.device)
    start, ttft = timed(lambda: prefill(model, input_ids), model.device)
    held = held_kv_bytes(start.cache)
    _, latency = timed(lambda: decode(model, start, options.decode_tokens), model.device)
    return ttft, latency / options.decode_tokens, held


def _row(
    name: str,
    model: Any,
    context: int,
    batch: int,
    samples: Sequence[tuple[float, float, int]] | None,
) -> Measurement:
    counted = batch * kv_cache_of(model.config).total_bytes(context, model.dtype.itemsize)
    if samples is None:
        return Measurement(name, context, batch, counted, None, None, None)
    ttfts, tpots, held = zip(*samples, strict=True)
    ttft, tpot = Timing(list(ttfts)), Timing(list(tpots))
    return Measurement(name, context, batch, counted, held[-1], ttft, tpot)


def _subject(name: str, model: Any) -> Subject:
    dtype = str(model.dtype).removeprefix("torch.")
    spec = spec_of(model.config)
    if spec is None or not spec.layers.sparse_layers:
        return Subject(name, "dense" if spec is None else "full", dtype, {})
    heads = kv_cache_of(model.config)
    like: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    q = torch.empty(1, 1, model.config.num_attention_heads, heads.head_dim, **like)
    k = torch.empty(1, 1, heads.num_kv_heads, heads.head_dim, **like)
    kernels = {op: str(choose(Call(op, q, k, k, spec.block_size))) for op in OPS}
    return Subject(name, f"{spec.layout} {spec.pattern}", dtype, kernels)


def _check_context(name: str, config: Any, options: BenchOptions) -> None:
    longest = config.max_position_embeddings
    asked = max(options.context) + options.decode_tokens
    if asked > longest:
        raise InvalidRecipe(
            f"bench.context {max(options.context)} and bench.decode_tokens {options.decode_tokens} "
            f"need {asked} positions, but {name} has {longest}: lower them"
        )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
