"""From a checkpoint and options to a finetuned checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hysparse_cli.devices import out_of_memory_is
from hysparse_cli.errors import Interrupted, InvalidRecipe
from hysparse_cli.finetune.corpus import corpus_of
from hysparse_cli.finetune.data import PackedRows
from hysparse_cli.finetune.group import Group, joined
from hysparse_cli.finetune.lora import add_adapters, check_peft
from hysparse_cli.finetune.objectives import check_objectives
from hysparse_cli.finetune.output import write_checkpoint
from hysparse_cli.finetune.result import FinetuneResult, Progress
from hysparse_cli.finetune.scalars import check_package, scalars
from hysparse_cli.finetune.sequence import prepare_rows
from hysparse_cli.finetune.sharding import sharded, whole
from hysparse_cli.finetune.share import rows_of_step
from hysparse_cli.finetune.state import begin_or_resume, read_facts, remove_state, saved_state
from hysparse_cli.finetune.trainer import Trainer
from hysparse_cli.finetune.weights import select_trainable
from hysparse_cli.loading import Loaded, load
from hysparse_cli.processes import world_size
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.source import locate
from hysparse_cli.staging import check_output, recover, require_free_space, staged

STATE_BYTES = 12  # of a trained parameter: its weight and AdamW's two moments, in float32


def finetune(
    checkpoint: str,
    out: Path,
    options: FinetuneOptions,
    on_step: Callable[[Progress], None],
    on_stage: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> FinetuneResult:
    """Train ``checkpoint``, dense or converted, and write the result to ``out``.

    Every process of a run calls this; the first writes, and all return the same.

    Args:
        checkpoint: a folder or hub id.
        on_step: called after each optimiser step.
        on_stage: told what is done besides, and how much of it.
    Raises: a HysparseError of the kind that fits.
    """
    source = locate(checkpoint).folder
    _check_data(options)
    _check_processes(options)
    check_package(options.log_to)
    check_peft(options)
    rows_of_step(options, world_size())
    with joined(options.device, options.sequence_parallel_size) as group, _interruptible(out):
        saved = group.from_first(_prepare(out, source, options) if group.is_first else None)
        with out_of_memory_is(_out_of_memory(options)):
            trainer, result = _train(checkpoint, out, source, options, saved, group, on_step)
        on_stage(f"writing {out.name}", 0, 1)
        weights = {}
        for name, weight in whole(trainer.trained.items()):
            if group.is_first:
                weights[name] = weight.cpu()
        if group.is_first:
            with staged(out, overwrite=options.overwrite, inputs=[source]) as folder:
                write_checkpoint(folder, checkpoint, weights, options, result)
            remove_state(out)
        group.from_first(None)  # nobody leaves before the checkpoint is there
    return result


def _train(
    checkpoint: str,
    out: Path,
    source: Path,
    options: FinetuneOptions,
    saved: Path | None,
    group: Group,
    on_step: Callable[[Progress], None],
) -> tuple[Trainer, FinetuneResult]:
    facts = read_facts(saved, source, options) if saved is not None else None
    torch.manual_seed(options.seed + group.rank)
    loaded, teacher = _load_models(checkpoint, options)
    prepare_rows(loaded.model, checkpoint, options.sequence_parallel_size, trained=True)
    if teacher is not None:
        prepare_rows(teacher, str(options.teacher), options.sequence_parallel_size, trained=False)
    if options.lora_rank is not None:
        add_adapters(loaded.model, options)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    names = _trained_names(loaded.model, options)
    require_free_space(out, _disk_bytes(loaded.model, names, options))
    if options.gradient_checkpointing:
        _checkpoint_activations(loaded.model)
    healing = sharded(loaded.model, teacher, names, group)
    trained = {name: p for name, p in loaded.model.named_parameters() if name in names}
    trainer = Trainer(healing, trained, PackedRows(options, loaded.tokenizer), options, group)
    if saved is not None and facts is not None:
        trainer.resume(saved, facts)
    resumed_at = len(trainer.history)
    with scalars(out, options, resumed_at, group) as log:

        def both(now: Progress) -> None:
            log(now)
            on_step(now)

        seconds = trainer.run(out, source, both)
    tokens = sum(step.tokens for step in trainer.history[resumed_at:])
    return trainer, FinetuneResult(
        checkpoint=checkpoint,
        teacher=options.teacher if teacher is not None else None,
        out=out,
        device=group.device.type,
        num_processes=group.world_size,
        dtype=dtype,
        num_trained=sum(parameter.numel() for parameter in trained.values()),
        resumed_at=resumed_at,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_memory_bytes=max(step.peak_memory_bytes for step in trainer.history),
        steps=trainer.history,
    )


def _prepare(out: Path, source: Path, options: FinetuneOptions) -> Path | None:
    """Tidy up after earlier runs; the state to go on from, if any."""
    recover(out)
    check_output(out, overwrite=options.overwrite, inputs=[source])
    return begin_or_resume(out, options)


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
        if (saved := saved_state(out)) is None:
            raise
        number = int(saved.name.rpartition("-")[2])
        raise Interrupted(
            f"interrupted; the state of step {number} is kept in {saved.parent}: --resume auto "
            "goes on from there"
        ) from None


def _trained_names(model: Any, options: FinetuneOptions) -> set[str]:
    """What any stage trains."""
    return {
        name
        for stage in options.resolved_stages()
        for name in select_trainable(model, stage.trainable)
    }


def _disk_bytes(model: Any, names: set[str], options: FinetuneOptions) -> int:
    """Bytes of the checkpoint, and of two states (the next is written before the last goes)."""
    output: int = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for name, p in model.named_parameters() if name in names)
    return output + (2 * trained * STATE_BYTES if options.save_every_steps else 0)


def _checkpoint_activations(model: Any) -> None:
    """Recompute each layer for its gradient; reentrant checkpointing would give wrong ones."""
    name = "activation_checkpointing_enable"  # transformers 5.17 has the other alone
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _check_data(options: FinetuneOptions) -> None:
    missing = []
    if options.data is None:
        missing.append(
            "finetune.data is not given: name a text, jsonl or parquet file, or hub:NAME (--data)"
        )
    needing = dict.fromkeys(s.objective for s in options.resolved_stages() if s.needs_teacher)
    if options.teacher is None and needing:
        missing.append(
            f"finetune.teacher is not given, which {' and '.join(needing)} need: name the dense "
            "checkpoint that was converted (--teacher)"
        )
    if missing:
        raise InvalidRecipe("; ".join(missing))
    corpus_of(options)


def _load_models(checkpoint: str, options: FinetuneOptions) -> tuple[Loaded, Any | None]:
    """The model to train and the teacher's, which fit the options and each other.

    Raises: InvalidRecipe where they do not.
    """
    loaded = load(checkpoint, dtype=options.dtype, device="cpu")
    _check_length(loaded.model, checkpoint, options)
    stages = options.resolved_stages()
    if options.teacher is None or not any(stage.needs_teacher for stage in stages):
        return loaded, None
    teacher = load(options.teacher, dtype=options.dtype, device="cpu")
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
    remedies = []
    if options.batch_size > 1:
        remedies.append(
            f"finetune.batch_size below {options.batch_size} (and gradient_accumulation up by as "
            "much)"
        )
    if not options.gradient_checkpointing:
        remedies.append("gradient_checkpointing: true")
    if options.dtype in ("auto", "float32"):
        remedies.append("dtype: bfloat16")
    if options.trainable == "all":
        remedies.append("trainable: attention or new")
    remedies.append(
        f"sequence_parallel_size above {options.sequence_parallel_size} (processes that split each "
        "row's tokens, up to the number of KV heads)"
    )
    remedies.append(f"sequence_tokens below {options.sequence_tokens}")
    return f"out of memory; what helps, most first: {', '.join(remedies)}"
