"""Keeps what was measured of one model on one text in a file, so that it is measured once."""

import json
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hysparse_cli.errors import InvalidRecipe, UnreadableInput
from hysparse_cli.files.checkpoint import Checkpoint
from hysparse_cli.files.output import write_whole
from hysparse_cli.placement.overlap import Overlap
from hysparse_cli.recipe import ConvertOptions
from hysparse_cli.units import rounded

SCHEMA = "hysparse.scores/1"
DIGITS = 6  # say more than a sample of text knows
SIZES = ("block_size", "top_k_tokens", "window_tokens")
TEXT = (
    "calibration",
    "calibration_text_field",
    "calibration_tokens",
    "calibration_sequence_tokens",
    "seed",
)
_PIECES, _PIECE_BYTES = 64, 4096


@dataclass
class Scores:
    """What is known of a model.

    model: its fingerprint. sizes, text: the options it was measured with, by name.
    losses: pattern -> its quality in memory, ``loss`` and ``kl``, see variants.py. paths: strategy
    -> the patterns it goes through, one for each number of full layers.
    """

    model: str
    sizes: dict[str, Any]
    text: dict[str, Any]
    environment: dict[str, Any]
    overlap: Overlap
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file whole or not at all.

        Raises: OutOfResources where it can't be written.
        """
        text = json.dumps({"schema": SCHEMA} | rounded(asdict(self), DIGITS), indent=1)
        write_whole(path, text + "\n")


def read_scores(path: Path, model: str, options: ConvertOptions) -> Scores:
    """The scores in ``path``.

    Args:
        model: the fingerprint of the model to convert.
        options: their sizes, and what they say of the calibration text, must be the file's.
    Raises: UnreadableInput where the file is no score file; InvalidRecipe where it is of another
        model or of other options.
    """
    again = "delete the file to measure again, or name another with --scores"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        overlap = Overlap(**content.pop("overlap"))
        scores = Scores(overlap=overlap, **content)
    except OSError as error:
        raise UnreadableInput(f"scores {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UnreadableInput(f"scores {path} is no file of {SCHEMA}: {again}") from None
    if scores.model != model:
        raise InvalidRecipe(f"scores {path} are of another model: {again}")
    measured = scores.sizes | scores.text
    asked = {name: getattr(options, name) for name in (*SIZES, *TEXT)}
    for name, value in asked.items():
        given = name in SIZES or name in options.model_fields_set
        if given and value is not None and measured[name] != value:
            raise InvalidRecipe(
                f"scores {path} were measured with {name} {measured[name]}, not {value}: {again}"
            )
    return scores


def fingerprint(checkpoint: Checkpoint) -> str:
    """What tells a checkpoint's weights from others': headers and a sample of each shard."""
    digest = sha256((checkpoint.folder / "config.json").read_bytes())
    for shard in checkpoint.shards:
        with shard.path.open("rb") as file:
            digest.update(file.read(shard.header_size))
            for piece in range(_PIECES):
                file.seek(shard.header_size + piece * (shard.size - shard.header_size) // _PIECES)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
