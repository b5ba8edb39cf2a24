"""Reads a checkpoint folder without loading it: headers first, all of them checked.

Only safetensors are read. ``open_checkpoint`` parses config.json and every shard's header, and
holds names, shapes and places; no weight is read.
"""

import fnmatch
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hysparse_cli.errors import UnreadableInput, UnsupportedModel, reads
from hysparse_cli.files.config_json import MOST_BYTES, check_config, check_counts
from hysparse_cli.files.reading import MOST_JSON_BYTES, parse_json, read_json
from hysparse_cli.printable import printable, single_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
)
CODE_FILES = ("*.py",)
_NOT_SIDE_FILES = ("config.json", "*.index.json", "hysparse_*", "adapter_*", "trainer_state.json")
_CHAT_TEMPLATES = "additional_chat_templates"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 16 << 20  # 130,000 tensors
_MAX_SIDE_FILE_BYTES = 256 << 20  # the largest tokenizers have 40 MB
_ADAPTER = "adapter_config.json"
_AGAIN = "download or save the checkpoint again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``size`` bytes from byte ``start`` of the file ``shard``."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file; ``tensors`` in the order in which they lie in it."""

    path: Path
    size: int
    tensors: tuple[StoredTensor, ...]

    @property
    def header_size(self) -> int:
        """Bytes before the first tensor."""
        return self.size - sum(tensor.size for tensor in self.tensors)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose headers are read and agree with each other."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises: UnreadableInput where the folder or the file is missing, or it is no JSON object.
    """
    with reads(folder):
        exists, is_folder = folder.exists(), folder.is_dir()
    if not exists:
        raise UnreadableInput(f"{printable(folder)}: no such folder")
    if not is_folder:
        raise UnreadableInput(f"{folder} is a file: give the folder that holds the checkpoint")
    path = folder / "config.json"
    if not _is_file(path):
        if _is_file(folder / _ADAPTER):
            raise _is_adapter(folder, "holds")
        raise UnreadableInput(
            f"{folder} has no config.json: give the folder of a Hugging Face checkpoint"
        )
    config = read_json(path, MOST_BYTES)
    if not isinstance(config, dict):
        raise UnreadableInput(f"{path} holds no JSON object")
    return config


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and all headers.

    Raises: UnreadableInput where something is missing, truncated or corrupt, config.json has a
        value that no model can have, or the folder holds an adapter; UnsupportedModel where the
        weights are pickled or quantised.
    """
    config = read_config(folder)
    if _is_file(folder / _ADAPTER):
        raise _is_adapter(folder, "has, beside its weights,")
    where = str(folder / "config.json")
    check_config(config, where)
    index = _index(folder)
    shards, owner = _read_shards(folder, sorted(set(index.values())) or [SINGLE])
    if lost := [name for name in sorted(index) if owner.get(name) != index[name]]:
        raise UnreadableInput(
            f"{folder / INDEX} places {printable(lost[0])} in {index[lost[0]]}, which does not "
            f"hold it ({len(lost)} such): {_AGAIN}"
        )
    if not owner:
        raise UnreadableInput(f"{folder} holds no tensors: {_AGAIN}")
    check_counts(config, owner, where)
    return Checkpoint(folder=folder, config=config, shards=shards)


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` holds any file of a tokenizer: without one transformers makes an empty one
    of the model's family."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def side_files(folder: Path, *, with_code: bool = False) -> list[Path]:
    """Files that belong to a checkpoint beside config and weights, relative to ``folder``.

    Tokenizer, chat templates, generation config, licence; Python code only ``with_code``.
    """
    patterns = SIDE_FILES + (CODE_FILES if with_code else ())
    with reads(folder):
        found = [
            path.relative_to(folder)
            for path in (*folder.iterdir(), *(folder / _CHAT_TEMPLATES).glob("*"))
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
            and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_SIDE_FILES)
            and path.is_file()
        ]
    return sorted(found)


def copy_side_files(folder: Path, target: Path, *, with_code: bool = False) -> None:
    """Copy ``side_files`` of ``folder`` to ``target`` as they are.

    Raises: UnreadableInput where one can't be read, or is too large for what it should be.
    """
    for name in side_files(folder, with_code=with_code):
        with reads(folder / name):
            source = (folder / name).open("rb")
        with source:
            size = os.fstat(source.fileno()).st_size
            small = name.suffix == ".json" and name.name != "tokenizer.json"
            if size > (MOST_JSON_BYTES if small else _MAX_SIDE_FILE_BYTES):
                raise UnreadableInput(
                    f"{printable(folder / name)} has {size:,} bytes, more than such a file may have"
                )
            (target / name).parent.mkdir(exist_ok=True)
            with (target / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> shard, or an empty mapping where one file holds all."""
    if _is_file(folder / SINGLE):
        return {}  # as transformers does: a single file wins over an index
    index = folder / INDEX
    if not _is_file(index):
        raise _no_weights(folder)
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableInput(f"{index} has no weight_map: {_AGAIN}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise UnreadableInput(
                f"{index} places {printable(tensor)} in {printable(repr(name))}, which is no name "
                f"of a file: {_AGAIN}"
            )
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not _is_file(folder / name):
            raise UnreadableInput(
                f"{index} names {printable(name)}, which is not there: the download may be "
                "incomplete"
            )
    return weight_map


def _is_file(path: Path) -> bool:
    """Whether ``path`` is a file, and no pipe or folder.

    Raises: UnreadableInput where the system refuses to say.
    """
    with reads(path):
        return path.is_file()


def _is_adapter(folder: Path, holds: str) -> UnreadableInput:
    content = read_json(folder / _ADAPTER)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return UnreadableInput(
        f"{printable(folder)} {holds} an adapter ({_ADAPTER}) of {printable(base or 'a base')}: "
        "merge it first, with peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
        ".merge_and_unload().save_pretrained(MERGED), and the tokenizer's save_pretrained(MERGED); "
        f"if the weights are merged already, remove {_ADAPTER}"
    )


def _no_weights(folder: Path) -> UnreadableInput | UnsupportedModel:
    with reads(folder):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
    if pickled:
        return UnsupportedModel(
            f"{folder} holds pickled weights ({pickled[0]}), which are never read: load it with "
            "transformers and save_pretrained() it as safetensors"
        )
    return UnreadableInput(
        f"{folder} has neither {SINGLE} nor {INDEX}: the download may be incomplete"
    )


def _read_shards(folder: Path, names: list[str]) -> tuple[tuple[Shard, ...], dict[str, str]]:
    """The shards, and tensor -> the shard that holds it, which must be one."""
    shards: list[Shard] = []
    owner: dict[str, str] = {}
    for name in names:
        shards.append(_read_shard(folder / name))
        for tensor in shards[-1].tensors:
            if tensor.name in owner:
                raise UnreadableInput(
                    f"tensor {printable(tensor.name)} is in both {owner[tensor.name]} and {name} "
                    f"of {folder}: remove the shard that does not belong"
                )
            owner[tensor.name] = name
    return tuple(shards), owner


def _read_shard(path: Path) -> Shard:
    size, raw = _read_header(path)
    begin = _LENGTH_BYTES + len(raw)
    try:
        entries = parse_json(raw, f"{path} is corrupt: its header").items()
        header = {name: entry for name, entry in entries if name != "__metadata__"}
        spans = {name: entry["data_offsets"] for name, entry in header.items()}
        tensors = [
            StoredTensor(
                name=name,
                shard=path,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                start=begin + spans[name][0],
                size=spans[name][1] - spans[name][0],
            )
            for name, entry in header.items()
        ]
        end = max((tensor.start + tensor.size for tensor in tensors), default=begin)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise UnreadableInput(f"{path} is corrupt: no safetensors header; {_AGAIN}") from None
    if end > size:
        raise UnreadableInput(f"{path} is truncated: {size} bytes of {end}; {_AGAIN}")
    try:
        # the library checks the rest: dtypes, shapes against sizes, overlaps, holes, excess bytes
        with reads(path), safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise UnreadableInput(f"{path} is corrupt: {single_line(error)}; {_AGAIN}") from None
    return Shard(path, size, tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.size))))


def _read_header(path: Path) -> tuple[int, bytes]:
    """The file's size and its JSON header."""
    with reads(path), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise UnreadableInput(
                f"{path} is corrupt: a header of {length} bytes, where {_MAX_HEADER_BYTES} are the "
                f"most that are read; {_AGAIN}"
            )
        raw = file.read(length)
    if size < _LENGTH_BYTES + length or length == 0:
        raise UnreadableInput(f"{path} is truncated in its header: {size} bytes; {_AGAIN}")
    return size, raw
