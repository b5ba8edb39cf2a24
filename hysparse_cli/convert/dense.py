"""Reads a dense checkpoint for conversion: its config and headers, each checked, and no weights."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hysparse_cli.errors import UnreadableInput, UnsupportedModel
from hysparse_cli.families import Family, check_rope, family_of
from hysparse_cli.files.checkpoint import FLOATS, Checkpoint, open_checkpoint, read_config
from hysparse_cli.files.config_json import without_switches
from hysparse_cli.files.source import Source
from hysparse_cli.model.config import MODEL_TYPE
from hysparse_cli.model.kv_cache import KvCache, kv_cache_of
from hysparse_cli.printable import printable

_INTEGERS = {"I64", "I32", "I16", "I8", "U8", "BOOL"}


@dataclass(frozen=True)
class DenseCheckpoint:
    """A dense checkpoint that can be converted.

    ``config`` is config.json without what says how to run the model (see ``without_switches``), and
    ``model_config`` transformers' object of it. ``dtype`` is torch's name of the dtype that most
    float weights have. ``unused`` tensors are stored although transformers will not load them.
    ``own_sinks``: the dense attention has sinks of its own.
    """

    source: Source
    checkpoint: Checkpoint
    family: Family
    config: dict[str, Any]
    model_config: Any
    dtype: str
    kv: KvCache
    unused: tuple[str, ...]
    own_sinks: bool

    @property
    def num_layers(self) -> int:
        return int(self.model_config.num_hidden_layers)

    @property
    def longest(self) -> int | None:
        """Tokens that the model reads, where its config says so."""
        return getattr(self.model_config, "max_position_embeddings", None)


def read_dense(source: Source) -> DenseCheckpoint:
    """Read config and headers of ``source`` and check them against the model they describe.

    Raises: UnreadableInput or UnsupportedModel, with the one reason.
    """
    config = read_config(source.folder)
    where = str(source.folder / "config.json")
    family = _family(config, where, source)
    # transformers takes seconds to import: what can be refused without it was refused above
    from hysparse_cli.convert.shapes import (
        check_forward,
        check_tensors,
        dense_config,
        expected_tensors,
    )

    checkpoint = open_checkpoint(source.folder)
    config = without_switches(config)
    model_config = dense_config(config, where)
    check_rope(getattr(model_config, "rope_parameters", None))
    kv, dtype = kv_cache_of(model_config), _float_dtype(checkpoint)
    expected = expected_tensors(model_config, where)
    unused = check_tensors(checkpoint, expected)
    check_forward(expected.model, where)
    return DenseCheckpoint(
        source=source,
        checkpoint=checkpoint,
        family=family,
        config=config,
        model_config=model_config,
        dtype=dtype,
        kv=kv,
        unused=tuple(unused),
        own_sinks=f"{family.attention.format(layer=0)}.sinks" in expected.shapes,
    )


def _family(config: Mapping[str, Any], where: str, source: Source) -> Family:
    model_type = config.get("model_type")
    if model_type == MODEL_TYPE or "hysparse" in config:
        raise UnsupportedModel(
            f"{printable(source.name)} is already a HySparse checkpoint: convert the dense "
            "one it came from"
        )
    if not isinstance(model_type, str):
        raise UnreadableInput(f"{where} has no model_type: give a Hugging Face checkpoint")
    return family_of(model_type)


def _float_dtype(checkpoint: Checkpoint) -> str:
    """torch's name of the dtype that most float weights have.

    Raises: UnsupportedModel where a tensor has a dtype that is not read; UnreadableInput where no
        tensor is of floats.
    """
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in FLOATS:
            sizes[FLOATS[tensor.dtype]] += tensor.size
        elif tensor.dtype not in _INTEGERS:
            raise UnsupportedModel(
                f"{tensor.shard}: tensor {printable(tensor.name)} is {tensor.dtype}: give the "
                "checkpoint in bfloat16, float16 or float32"
            )
    if not sizes:
        raise UnreadableInput(f"{checkpoint.folder} holds no float weights")
    return sizes.most_common(1)[0][0]
