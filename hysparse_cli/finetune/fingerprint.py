"""Hashes what a checkpoint and data hold: quickly, and the same wherever they lie.

Of large files samples are hashed. What they miss: a change inside a tensor, or a data file of a
gigabyte and more, that lies between the samples and leaves every size as it was.
"""

import json
import os
from collections.abc import Iterable, Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO, Any

from hysparse_cli.errors import reads
from hysparse_cli.files.checkpoint import Checkpoint, Shard, open_checkpoint, side_files
from hysparse_cli.files.provenance import provenance
from hysparse_cli.recipe import FinetuneOptions
from hysparse_cli.texts.corpus import HUB

TENSOR_SAMPLE = 8 << 10  # bytes at the start, in the middle and at the end of each tensor
WHOLE_BELOW = 10**9
DATA_SAMPLE, DATA_SAMPLES = 64 << 10, 256
_UNTRAINED = ("generation_config.json", "LICENSE*", "NOTICE*")  # side files that change no step
_COMPRESSED = {".gz", ".xz", ".bz2", ".zst"}

Fingerprint = dict[str, Any]


def of_checkpoint(folder: Path) -> Fingerprint:
    """Hashes of "config", "tokenizer" (every small file that is not one of the others), "tensors"
    (the shards' headers) and "weights" (samples of each tensor).

    Raises: UnreadableInput as ``open_checkpoint`` does.
    """
    checkpoint = open_checkpoint(folder)
    small = [
        name
        for name in side_files(folder, with_code=True)
        if not any(name.match(pattern) for pattern in _UNTRAINED)
    ]
    with reads(folder):
        files = provenance(checkpoint, small)
        return {
            "config": files["config.json"]["sha256"],
            "tokenizer": _hash([str(name), files[str(name)]["sha256"]] for name in small),
            "tensors": _hash(_headers(checkpoint, files)),
            "weights": _hash(_samples(checkpoint.shards)),
        }


def of_data(options: FinetuneOptions) -> Fingerprint:
    """ "format" (the file's ending) and "content"; of a data set on the hub "name" and "revision".

    Raises: UnreadableInput where it can't be read.
    """
    assert options.data is not None
    name = options.data.removeprefix(HUB)
    path = Path(os.path.expanduser(name))
    if name != options.data and not path.exists():
        from datasets import load_dataset_builder

        return {"name": name, "revision": load_dataset_builder(name, options.data_subset).hash}
    with reads(path):
        if path.is_file():
            return {"format": _ending(path), "content": _content(path)}
        files = sorted(file for file in path.rglob("*") if file.is_file())
        named = ([str(file.relative_to(path)), _content(file)] for file in files)
        return {"format": "folder", "content": _hash(named)}


def _headers(checkpoint: Checkpoint, files: dict[str, dict[str, Any]]) -> Iterator[list[Any]]:
    for shard in checkpoint.shards:
        known = files[shard.path.name]
        yield [shard.path.name, known["bytes"], known["header_sha256"]]


def _samples(shards: Iterable[Shard]) -> Iterator[str]:
    for shard in shards:
        hashed = sha256()
        with shard.path.open("rb") as file:
            for tensor in shard.tensors:
                last = tensor.start + max(0, tensor.size - TENSOR_SAMPLE)
                for begin in sorted({tensor.start, (tensor.start + last) // 2, last}):
                    hashed.update(_at(file, begin, min(TENSOR_SAMPLE, tensor.size)))
        yield hashed.hexdigest()


def _content(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size < WHOLE_BELOW:
            return file_digest(file, "sha256").hexdigest()
        hashed = sha256(str(size).encode())
        for number in range(DATA_SAMPLES):
            begin = number * (size - DATA_SAMPLE) // (DATA_SAMPLES - 1)
            hashed.update(_at(file, begin, DATA_SAMPLE))
    return hashed.hexdigest()


def _at(file: IO[bytes], begin: int, size: int) -> bytes:
    file.seek(begin)
    return file.read(size)


def _ending(path: Path) -> str:
    """The ending that says how a file is read: its last, or last two where it is compressed."""
    endings = [ending.lower() for ending in path.suffixes]
    return "".join(endings[-2:] if endings[-1:] and endings[-1] in _COMPRESSED else endings[-1:])


def _hash(parts: Iterable[Any]) -> str:
    return sha256(json.dumps(list(parts)).encode()).hexdigest()
