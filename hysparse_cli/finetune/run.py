"""From a checkpoint and options to a finetuned checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hysparse_cli.devices import out_of_memory_is
from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.finetune.data import PackedRows
from hysparse_cli.finetune.objectives import check_objectives
from hysparse_cli.finetune.output import write_checkpoint
from hysparse_cli.finetune.result import FinetuneResult, Progress
from hysparse_cli.finetune.state import begin_or_resume, remove_state
from hysparse_cli.finetune.trainer import Trainer
from hysparse_cli.loading import Loaded, load
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.source import locate
from hysparse_cli.staging import check_output, recover, require_free_space, staged

STATE_BYTES = 12  # of a trained parameter: its master weight and AdamW's two moments, in float32


def finetune(
    checkpoint: str, out: Path, options: FinetuneOptions, on_step: Callable[[Progress], None]
) -> FinetuneResult:
    """Train ``checkpoint``, dense or converted, and write the result to ``out``.

    Args:
        checkpoint: a folder or hub id.
        on_step: called after each optimiser step.
    Raises: a HysparseError of the kind that fits.
    """
    source = locate(checkpoint).folder
    _check_data(options)
    recover(out)
    check_output(out, overwrite=options.overwrite, inputs=[source])
    state = begin_or_resume(out, source, options)
    with out_of_memory_is(_out_of_memory(options)):
        torch.manual_seed(options.seed)
        loaded, teacher = _load_models(checkpoint, options)
        if options.gradient_checkpointing:
            _checkpoint_activations(loaded.model)
        rows = PackedRows(options, loaded.tokenizer)
        trainer = Trainer(loaded.model, teacher, rows, options)
        parameters = trainer.weights.parameters
        require_free_space(out, _disk_bytes(loaded.model, parameters, options))
        if state is not None:
            trainer.resume(state)
            del state
        resumed_at = len(trainer.history)
        seconds = trainer.run(out, source, on_step)
    tokens = sum(step.tokens for step in trainer.history[resumed_at:])
    result = FinetuneResult(
        checkpoint=checkpoint,
        teacher=options.teacher if teacher is not None else None,
        out=out,
        device=str(loaded.model.device),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        num_trained=sum(parameter.numel() for parameter in parameters.values()),
        resumed_at=resumed_at,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        steps=trainer.history,
    )
    with staged(out, overwrite=options.overwrite, inputs=[source]) as folder:
        write_checkpoint(folder, loaded, options, result)
    remove_state(out)
    return result


def _disk_bytes(model: Any, parameters: dict[str, nn.Parameter], options: FinetuneOptions) -> int:
    """Bytes of the checkpoint, and of two states (the next is written before the last goes)."""
    output: int = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in parameters.values())
    return output + (2 * trained * STATE_BYTES if options.save_every_steps else 0)


def _checkpoint_activations(model: Any) -> None:
    """Recompute each layer for its gradient; reentrant checkpointing would give wrong ones."""
    name = "activation_checkpointing_enable"  # transformers 5.17 has the other alone
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _check_data(options: FinetuneOptions) -> None:
    missing = []
    if options.data is None:
        missing.append("finetune.data is not given: name a text or jsonl file to train on (--data)")
    needing = dict.fromkeys(s.objective for s in options.resolved_stages() if s.needs_teacher)
    if options.teacher is None and needing:
        missing.append(
            f"finetune.teacher is not given, which {' and '.join(needing)} need: name the dense "
            "checkpoint that was converted (--teacher)"
        )
    if missing:
        raise InvalidRecipe("; ".join(missing))
    assert options.data is not None
    if not Path(options.data).expanduser().is_file():
        raise UnreadableInput(f"data {options.data}: no such file")


def _load_models(checkpoint: str, options: FinetuneOptions) -> tuple[Loaded, Any | None]:
    """The model to train and the teacher's, which fit the options and each other.

    Raises: InvalidRecipe where they do not.
    """
    loaded = load(checkpoint, dtype=options.dtype, device=options.device)
    _check_length(loaded.model, checkpoint, options)
    stages = options.resolved_stages()
    if options.teacher is None or not any(stage.needs_teacher for stage in stages):
        return loaded, None
    teacher = load(options.teacher, dtype=options.dtype, device=options.device)
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
    remedies.append(f"sequence_tokens below {options.sequence_tokens}")
    return f"out of memory; what helps, most first: {', '.join(remedies)}"
