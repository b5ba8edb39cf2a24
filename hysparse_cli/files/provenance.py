"""Notes what a checkpoint was made from: enough to tell its files from any others.

Small files and the headers of shards (names, shapes, places of all tensors) are hashed. Hashing the
weights would cost more than copying them, so theirs is known only where the hub has told it: its
cache names each large file by its SHA-256.
"""

import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from hysparse_cli.errors import reads
from hysparse_cli.files.checkpoint import Checkpoint, Shard

_SHA256 = re.compile(r"[0-9a-f]{64}")


def provenance(checkpoint: Checkpoint, small: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """File -> ``bytes`` and ``sha256``; of a shard ``header_sha256``, and ``sha256`` if known."""
    files: dict[str, dict[str, Any]] = {}
    for name in (Path("config.json"), *small):
        with reads(checkpoint.folder / name):
            content = (checkpoint.folder / name).read_bytes()
        files[str(name)] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    for shard in checkpoint.shards:
        files[shard.path.name] = _of_shard(shard)
    return files


def _of_shard(shard: Shard) -> dict[str, Any]:
    with reads(shard.path), shard.path.open("rb") as file:
        header = file.read(shard.header_size)
    known = {"bytes": shard.size, "header_sha256": sha256(header).hexdigest()}
    blob = shard.path.resolve().name
    return known | ({"sha256": blob} if _SHA256.fullmatch(blob) else {})
