"""Loading a checkpoint, dense or converted, to run it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hysparse_cli.checkpoint import open_checkpoint
from hysparse_cli.devices import out_of_memory_is
from hysparse_cli.errors import (
    HysparseError,
    OutOfResources,
    UnreadableInput,
    UnsupportedModel,
    from_system,
    system_error,
)
from hysparse_cli.model.config import spec_of
from hysparse_cli.printable import printable, single_line
from hysparse_cli.source import locate


class Loaded(NamedTuple):
    """``model`` is a transformers causal language model in eval mode, ``tokenizer`` its own."""

    model: Any
    tokenizer: Any
    folder: Path


def load(checkpoint: str, *, dtype: str = "auto", device: str = "auto") -> Loaded:
    """Load a folder or hub id; every header is checked first.

    Args:
        dtype: "auto" is the checkpoint's own.
        device: "auto" is the first CUDA device, or the CPU.
    Raises: UnreadableInput where the checkpoint is missing, corrupt or incomplete; UnsupportedModel
        where transformers or this version can't load it; OutOfResources where there is no such
        device or not enough memory.
    """
    target = resolve_device(device)
    folder = locate(checkpoint).folder
    config = open_checkpoint(folder).config
    tokenizer = load_tokenizer(folder)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto: Any = AutoModelForCausalLM
    try:
        spec_of(config)
        with out_of_memory_is(
            f"{checkpoint} does not fit on {target}: load it in bfloat16 (dtype), or on another "
            "device"
        ):
            model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
            model.to(target)
    except (HysparseError, MemoryError):
        raise
    except Exception as error:  # whatever transformers makes of the checkpoint
        if (refusal := system_error(error)) and refusal.errno is not None:
            raise from_system(refusal, checkpoint, writing=False) from error
        raise UnsupportedModel(f"{checkpoint} can't be loaded: {single_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UnreadableInput(
            f"{checkpoint} lacks {missing[0]} ({len(missing)} tensors in all): download or save it "
            "again"
        )
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.get_input_embeddings().register_forward_pre_hook(_within(tokenizer))
    return Loaded(model.eval(), tokenizer, folder)


def _within(tokenizer: Any) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    """A hook of an embedding that refuses the ids which ``tokenizer`` has beyond it."""

    def check(embedding: Any, args: tuple[torch.Tensor, ...]) -> None:
        rows, highest = embedding.weight.shape[0], int(args[0].max()) if args[0].numel() else 0
        if highest >= rows:
            token = printable(repr(tokenizer.convert_ids_to_tokens(highest)))
            raise UnreadableInput(
                f"the text has token {token} of id {highest}, but the model embeds {rows} tokens "
                f"of the tokenizer's {len(tokenizer)}: leave it out of the text, or give the "
                "checkpoint its own tokenizer"
            )

    return check


def load_to_measure(folder: Path, *, dtype: str = "auto", device: str = "auto") -> Loaded:
    """As ``load``, but in float32 on a CPU, which is slow in the other dtypes."""
    on_cpu = resolve_device(device).type == "cpu"
    return load(str(folder), dtype="float32" if on_cpu else dtype, device=device)


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """What to call ``checkpoints`` in a table: their last part, or all of it where those clash."""
    names = [checkpoint.rstrip("/").rpartition("/")[2] for checkpoint in checkpoints]
    return names if len(set(names)) == len(names) and all(names) else list(checkpoints)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises: UnreadableInput where it has none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:  # a panic of tokenizers is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = single_line(error)
        raise UnreadableInput(f"{folder} has no tokenizer that can be read: {reason}") from None


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" names here.

    Raises: OutOfResources where CUDA is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise OutOfResources("device is cuda, but torch finds no CUDA device: use device cpu")
    return torch.device(device)
