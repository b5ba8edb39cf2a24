"""Loads a checkpoint, dense or converted, to run it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from hysparse_cli.devices import out_of_memory_is
from hysparse_cli.errors import (
    HysparseError,
    OutOfResources,
    UnreadableInput,
    UnsupportedModel,
    from_system,
    system_error,
)
from hysparse_cli.families import FAMILIES
from hysparse_cli.files.checkpoint import has_tokenizer, open_checkpoint
from hysparse_cli.files.foreign import brings_code, check_code
from hysparse_cli.files.reading import MOST_JSON_BYTES
from hysparse_cli.files.source import locate
from hysparse_cli.model.config import MODEL_TYPE, spec_of
from hysparse_cli.printable import printable, single_line, typed_line


class Loaded(NamedTuple):
    """``model`` is a transformers causal language model in eval mode, ``tokenizer`` its own."""

    model: Any
    tokenizer: Any
    folder: Path


def load(
    checkpoint: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Loaded:
    """Load a folder or hub id; every header is checked first.

    Args:
        dtype: "auto" is the checkpoint's own.
        device: "auto" is the first CUDA device, or the CPU.
        trust_remote_code: run Python code that it brings: its tokenizer's, and its model's where
            the family is none of families.py, whose models are always transformers' own.
    Raises: UnreadableInput where the checkpoint is missing, corrupt or incomplete, or brings code
        that is not trusted; UnsupportedModel where transformers or this version can't load it;
        OutOfResources where there is no such device or not enough memory.
    """
    target = resolve_device(device)
    folder = locate(checkpoint, trust_remote_code=trust_remote_code).folder
    content = open_checkpoint(folder).config
    tokenizer = _load_tokenizer(folder, trust_remote_code)
    trusted = trust_remote_code and content.get("model_type") not in (*FAMILIES, MODEL_TYPE)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto: Any = AutoModelForCausalLM
    with _refuses(checkpoint):
        spec_of(content)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        config._attn_implementation = config._experts_implementation = None  # see without_switches
        with out_of_memory_is(
            f"{checkpoint} does not fit on {target}: load it in bfloat16 (dtype), or on another "
            "device"
        ):
            model, info = auto.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=trusted,
            )
            model.to(target)
    if missing := sorted(info["missing_keys"]):
        raise UnreadableInput(
            f"{checkpoint} lacks {missing[0]} ({len(missing)} tensors in all): download or save it "
            "again"
        )
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.get_input_embeddings().register_forward_pre_hook(_within(tokenizer))
    return Loaded(model.eval(), tokenizer, folder)


@contextmanager
def _refuses(checkpoint: str) -> Iterator[None]:
    """What transformers raises on a checkpoint that it can't load is the checkpoint's fault."""
    try:
        yield
    except (HysparseError, MemoryError):
        raise
    except Exception as error:
        if (refusal := system_error(error)) and refusal.errno is not None:
            raise from_system(refusal, checkpoint, writing=False) from error
        reason = single_line(error)
        if "trust_remote_code" in reason:
            raise brings_code(checkpoint) from None
        if isinstance(error, ValueError):
            raise UnsupportedModel(f"{checkpoint} can't be loaded: {reason}") from error
        raise UnreadableInput(f"{checkpoint} can't be loaded: {typed_line(error)}") from error


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


def load_to_measure(
    checkpoint: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Loaded:
    """As ``load``, but in float32 on a CPU, which is slow in the other dtypes."""
    on_cpu = resolve_device(device).type == "cpu"
    return load(
        checkpoint,
        dtype="float32" if on_cpu else dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )


class LazyModel:
    """A model that a command measures: loaded where it is first asked for, and only once.

    Args:
        name: its checkpoint's, for messages.
        load: loads it.
    """

    def __init__(self, name: str, load: Callable[[], Loaded]):
        self.name = name
        self._load = load

    @cached_property
    def loaded(self) -> Loaded:
        """The model and its tokenizer.

        Raises: what ``load`` does.
        """
        return self._load()

    def twin(self) -> Any:
        """Another model of the same weights, for what rewires it (sparse layers, swaps).

        Modules, hooks and config are its own; parameters and buffers are shared, and not copied.
        """
        model = self.loaded.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, shared)


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """What to call ``checkpoints`` in a table: their last part, or all of it where those clash."""
    names = [checkpoint.rstrip("/").rpartition("/")[2] for checkpoint in checkpoints]
    return names if len(set(names)) == len(names) and all(names) else list(checkpoints)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises: UnreadableInput where it has none that transformers can read, or one with code of its
        own that is not trusted.
    """
    check_code(folder, trust_remote_code=trust_remote_code)
    return _load_tokenizer(folder, trust_remote_code)


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """As ``load_tokenizer``, of a folder that ``check_code`` has let through."""
    if not has_tokenizer(folder):
        raise UnreadableInput(f"{folder} has no tokenizer: copy the model's tokenizer files there")
    try:
        _check_large(folder / "tokenizer.json")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except MemoryError:
        raise
    except BaseException as error:  # of many kinds; a panic of tokenizers is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise brings_code(f"the tokenizer of {folder}") from None
        raise UnreadableInput(
            f"{folder} has no tokenizer that can be read: {typed_line(error)}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        kind = type(tokenizer).__name__
        raise UnreadableInput(f"{folder}: its tokenizer_class is {kind}, which is no tokenizer")
    return tokenizer


def _check_large(path: Path) -> None:
    """Raise where a large tokenizer.json is none: transformers would first build all it holds."""
    if path.is_file() and path.stat().st_size > MOST_JSON_BYTES:
        Tokenizer.from_file(str(path))


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" names here.

    Raises: OutOfResources where CUDA is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise OutOfResources("device is cuda, but torch finds no CUDA device: use device cpu")
    return torch.device(device)
