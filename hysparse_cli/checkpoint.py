"""Reading a checkpoint folder without loading it: headers first, all of them checked.

Only safetensors are read. ``open_checkpoint`` parses config.json and every shard's header, and
holds names, shapes and places; no weight is read.
"""

import fnmatch
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hysparse_cli.errors import UnreadableInput, UnsupportedModel, reads
from hysparse_cli.reading import parse_json, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
CODE_FILES = ("*.py",)
_NOT_SIDE_FILES = ("config.json", "*.index.json", "hysparse_*", "adapter_*", "trainer_state.json")
_CHAT_TEMPLATES = "additional_chat_templates"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
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
    if not folder.exists():
        raise UnreadableInput(f"{folder}: no such folder")
    if not folder.is_dir():
        raise UnreadableInput(f"{folder} is a file: give the folder that holds the checkpoint")
    path = folder / "config.json"
    if not path.is_file():
        raise UnreadableInput(
            f"{folder} has no config.json: give the folder of a Hugging Face checkpoint"
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise UnreadableInput(f"{path} holds no JSON object")
    return config


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and all headers.

    Raises: UnreadableInput where something is missing, truncated or corrupt; UnsupportedModel where
        the weights are pickled or quantised.
    """
    config = read_config(folder)
    if quantization := config.get("quantization_config"):
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method", "unknown") if known else quantization
        raise UnsupportedModel(
            f"{folder / 'config.json'}: the weights are quantised (quant_method {method!r}): give "
            "the checkpoint in bfloat16, float16 or float32"
        )
    index = _index(folder)
    names = sorted(set(index.values())) or [SINGLE]
    shards = tuple(_read_shard(folder / name) for name in names)
    owner: dict[str, str] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in owner:
            raise UnreadableInput(
                f"tensor {tensor.name} is in both {owner[tensor.name]} and {tensor.shard.name} of "
                f"{folder}: remove the shard that does not belong"
            )
        owner[tensor.name] = tensor.shard.name
    if lost := [name for name in sorted(index) if owner.get(name) != index[name]]:
        raise UnreadableInput(
            f"{folder / INDEX} places {lost[0]} in {index[lost[0]]}, which does not hold it "
            f"({len(lost)} such): {_AGAIN}"
        )
    if not owner:
        raise UnreadableInput(f"{folder} holds no tensors: {_AGAIN}")
    return Checkpoint(folder=folder, config=config, shards=shards)


def side_files(folder: Path, *, with_code: bool = False) -> list[Path]:
    """Files that belong to a checkpoint beside config and weights, relative to ``folder``.

    Tokenizer, chat templates, generation config, licence; Python code only ``with_code``.
    """
    patterns = SIDE_FILES + (CODE_FILES if with_code else ())
    found = [
        path.relative_to(folder)
        for path in (*folder.iterdir(), *(folder / _CHAT_TEMPLATES).glob("*"))
        if path.is_file()
        and any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in _NOT_SIDE_FILES)
    ]
    return sorted(found)


def copy_side_files(folder: Path, target: Path, *, with_code: bool = False) -> None:
    """Copy ``side_files`` of ``folder`` to ``target`` as they are."""
    for name in side_files(folder, with_code=with_code):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, target / name)


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> shard, or an empty mapping where one file holds all."""
    if (folder / SINGLE).is_file():
        return {}  # as transformers does: a single file wins over an index
    index = folder / INDEX
    if not index.is_file():
        raise _no_weights(folder)
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableInput(f"{index} has no weight_map: {_AGAIN}")
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name or not (folder / name).is_file():
            raise UnreadableInput(
                f"{index} names {name}, which is not there: the download may be incomplete"
            )
    return weight_map


def _no_weights(folder: Path) -> UnreadableInput | UnsupportedModel:
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
    if pickled:
        return UnsupportedModel(
            f"{folder} holds pickled weights ({pickled[0]}), which are never read: load it with "
            "transformers and save_pretrained() it as safetensors"
        )
    return UnreadableInput(
        f"{folder} has neither {SINGLE} nor {INDEX}: the download may be incomplete"
    )


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
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise UnreadableInput(f"{path} is corrupt: {error}; {_AGAIN}") from None
    return Shard(path, size, tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.size))))


def _read_header(path: Path) -> tuple[int, bytes]:
    """The file's size and its JSON header."""
    with reads(path), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise UnreadableInput(f"{path} is corrupt: a header of {length} bytes; {_AGAIN}")
        raw = file.read(length)
    if size < _LENGTH_BYTES + length or length == 0:
        raise UnreadableInput(f"{path} is truncated in its header: {size} bytes; {_AGAIN}")
    return size, raw
