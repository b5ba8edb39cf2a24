"""Trains a checkpoint as the options say and writes the result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from hysparse_cli.devices import out_of_memory_is
from hysparse_cli.errors import Interrupted, InvalidRecipe
from hysparse_cli.files.output import staged
from hysparse_cli.files.source import locate
from hysparse_cli.finetune.begin import Start, begin, inputs_of
from hysparse_cli.finetune.context_parallel import prepare_attention
from hysparse_cli.finetune.data import PackedRows, rows_of_step
from hysparse_cli.finetune.distributed import World, joined
from hysparse_cli.finetune.lock import locked
from hysparse_cli.finetune.log import check_package, step_log
from hysparse_cli.finetune.objectives import check_objectives
from hysparse_cli.finetune.output import write_checkpoint
from hysparse_cli.finetune.result import FinetuneResult, Progress
from hysparse_cli.finetune.sharding import sharded, whole
from hysparse_cli.finetune.state import (
    check_folder,
    kept_of,
    remove_state,
    state_folder,
)
from hysparse_cli.finetune.trainable import add_adapters, check_peft, select_trainable
from hysparse_cli.finetune.trainer import Trainer
from hysparse_cli.model.loading import Loaded, load
from hysparse_cli.processes import world_size
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.texts.corpus import Corpus, corpus_of


def finetune(
    checkpoint: str,
    out: Path,
    options: FinetuneOptions,
    on_step: Callable[[Progress], None],
    on_stage: Callable[[str, int, int], None] = lambda stage, done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> FinetuneResult:
    """Train ``checkpoint``, dense or converted, and write the result to ``out``.

    Every process of a run calls this; the first writes, and all return the same.

    Args:
        checkpoint: a folder or hub id.
        on_step: called after each optimiser step.
        on_stage: told what is done besides, and how much of it.
        on_note: told lines for people, in the first process.
    Raises: a HysparseError of the kind that fits.
    """
    source = locate(checkpoint, trust_remote_code=options.trust_remote_code).folder
    corpus = _check_data(options)
    _check_processes(options)
    check_package(options.log_to)
    check_peft(options)
    rows_of_step(options, world_size())
    check_folder(out)
    with (
        joined(options.device, options.sequence_parallel_size) as world,
        _interruptible(out),
        locked(state_folder(out), on_note) if world.is_first else nullcontext(),
    ):
        found = None
        if world.is_first:
            found = begin(out, source, options, world.device, on_note)
        start = world.from_first(found)
        if isinstance(start, FinetuneResult):
            return start
        assert start is not None
        corpus.check(
            lambda done, total: on_stage(f"checking {options.data} (MB)", done >> 20, total >> 20)
        )
        with out_of_memory_is(_out_of_memory(options)):
            trainer, result = _train(checkpoint, out, start, world, corpus, on_step, on_note)
        on_stage(f"writing {out.name}", 0, 1)
        weights = {}
        for name, weight in whole(trainer.trained.items()):
            if world.is_first:
                weights[name] = weight.cpu()
        if world.is_first:
            asked = options if start.run.asked == start.run.stages else start.options
            inputs = inputs_of(source, options)
            with staged(out, overwrite=start.replaces, inputs=inputs) as folder:
                write_checkpoint(folder, checkpoint, weights, asked, result)
            if not options.keep_state:
                remove_state(out)
        world.from_first(None)  # nobody leaves before the checkpoint is there
    return result


def _train(
    checkpoint: str,
    out: Path,
    start: Start,
    world: World,
    corpus: Corpus,
    on_step: Callable[[Progress], None],
    on_note: Callable[[str], None],
) -> tuple[Trainer, FinetuneResult]:
    options = start.options
    torch.manual_seed(options.seed + world.rank)
    loaded, teacher = _load_models(checkpoint, options)
    prepare_attention(loaded.model, checkpoint, options.sequence_parallel_size, trained=True)
    if teacher is not None:
        prepare_attention(
            teacher, str(options.teacher), options.sequence_parallel_size, trained=False
        )
    if options.lora_rank is not None:
        add_adapters(loaded.model, options)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    names = _trained_names(loaded.model, options)
    if options.gradient_checkpointing:
        _checkpoint_activations(loaded.model)
    module = sharded(loaded.model, teacher, names, world)
    trained = {name: p for name, p in loaded.model.named_parameters() if name in names}
    rows = PackedRows(options, loaded.tokenizer, corpus)
    trainer = Trainer(module, trained, rows, start, world)
    if start.saved is not None:
        trainer.resume(start.saved)
    for line in start.said:
        on_note(line)
    resumed_at = len(trainer.history)
    with step_log(out, options, resumed_at, world) as log:

        def both(now: Progress) -> None:
            log(now)
            on_step(now)

        seconds = trainer.run(out, both)
    tokens = sum(step.tokens for step in trainer.history[resumed_at:])
    return trainer, FinetuneResult(
        checkpoint=checkpoint,
        teacher=options.teacher if teacher is not None else None,
        out=out,
        device=world.device.type,
        num_processes=world.size,
        dtype=dtype,
        num_trained=sum(parameter.numel() for parameter in trained.values()),
        resumed_at=resumed_at,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_memory_bytes=max(step.peak_memory_bytes for step in trainer.history),
        bad_rows=corpus.bad_rows,
        steps=trainer.history,
        run=start.run,
        notes=start.facts["notes"],
    )


def _check_processes(options: FinetuneOptions) -> None:
    wanted = options.nproc_per_node
    if wanted is not None and wanted != world_size():
        raise InvalidRecipe(
            f"finetune.nproc_per_node is {wanted}, but {world_size()} processes were started: "
            "leave it out where torchrun or accelerate starts them"
        )


@contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    """Let an interrupt say what is kept.

    Raises: Interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        if (kept := kept_of(out)) is None:
            raise
        raise Interrupted(kept) from None


def _trained_names(model: Any, options: FinetuneOptions) -> set[str]:
    """What any stage trains."""
    return {
        name
        for stage in options.resolved_stages()
        for name in select_trainable(model, stage.trainable)
    }


def _checkpoint_activations(model: Any) -> None:
    """Recompute each layer for its gradient; reentrant checkpointing would give wrong ones."""
    name = "activation_checkpointing_enable"  # transformers 5.17 has only the other
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _check_data(options: FinetuneOptions) -> Corpus:
    missing = []
    if options.data is None:
        missing.append(
            "finetune.data is not given: name a file of text or records, or hub:NAME (--data)"
        )
    needing = dict.fromkeys(s.objective for s in options.resolved_stages() if s.needs_teacher)
    if options.teacher is None and needing:
        missing.append(
            f"finetune.teacher is not given, which {' and '.join(needing)} need: name the dense "
            "checkpoint that was converted (--teacher)"
        )
    if missing:
        raise InvalidRecipe("; ".join(missing))
    return corpus_of(options)


def _load_models(checkpoint: str, options: FinetuneOptions) -> tuple[Loaded, Any | None]:
    """The model to train and the teacher's, which fit the options and each other.

    Raises: InvalidRecipe where they do not.
    """
    how: dict[str, Any] = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    loaded = load(checkpoint, device="cpu", **how)
    _check_length(loaded.model, checkpoint, options)
    stages = options.resolved_stages()
    if options.teacher is None or not any(stage.needs_teacher for stage in stages):
        return loaded, None
    teacher = load(options.teacher, device="cpu", **how)
    _check_same_vocabulary(loaded, teacher, options.teacher)
    _check_length(teacher.model, options.teacher, options)
    check_objectives(stages, loaded.model, teacher.model)
    return loaded, teacher.model.requires_grad_(False)


def _check_length(model: Any, name: str, options: FinetuneOptions) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and options.sequence_tokens > longest:
        raise InvalidRecipe(
            f"finetune.sequence_tokens is {options.sequence_tokens}, but {name} takes {longest} at "
            "most (max_position_embeddings in its config.json)"
        )


def _check_same_vocabulary(student: Loaded, teacher: Loaded, name: str) -> None:
    sizes = teacher.model.config.vocab_size, student.model.config.vocab_size
    if sizes[0] != sizes[1]:
        what = f"{sizes[0]} tokens instead of {sizes[1]}"
    elif teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        what = "the same number of tokens, but others"
    else:
        return
    raise InvalidRecipe(
        f"finetune.teacher {name} has another vocabulary than the checkpoint: {what}; the teacher "
        "is the dense model that was converted, or one of its family"
    )


def _out_of_memory(options: FinetuneOptions) -> str:
    same, others = [], []  # with the first kind, --resume goes on with the same run
    if options.batch_size > 1:
        same.append(
            f"finetune.batch_size below {options.batch_size} (and gradient_accumulation up by as "
            "much)"
        )
    if not options.gradient_checkpointing:
        same.append("gradient_checkpointing: true")
    same.append(
        f"sequence_parallel_size above {options.sequence_parallel_size} (processes that split each "
        "row's tokens, up to the number of KV heads)"
    )
    if options.dtype in ("auto", "float32"):
        others.append("dtype: bfloat16")
    if options.trainable == "all":
        others.append("trainable: attention or new")
    others.append(f"sequence_tokens below {options.sequence_tokens}")
    return (
        f"out of memory; what helps, most first: {', '.join(same)}, with all of which --resume "
        f"auto goes on where state was saved; {', '.join(others)}, which begin another run"
    )
