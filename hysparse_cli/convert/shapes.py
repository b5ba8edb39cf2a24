"""Checks that a checkpoint holds what its config promises: the dense model, unallocated."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from typing import Any

from hysparse_cli.errors import HysparseError, UnreadableInput
from hysparse_cli.files.checkpoint import FLOATS, Checkpoint, StoredTensor
from hysparse_cli.files.config_json import without_switches
from hysparse_cli.printable import printable, single_line

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_MOST_FREQUENCIES = 1 << 16
_OURS = re.compile(r"(?:^|\.)hysparse\.")
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")


@dataclass(frozen=True)
class Expected:
    """What the dense model has: those of its tensors that are no floats are ``integers``; ``tied``
    ones need not be on disk; ``ignored`` are known leftovers; ``renamed`` families name or split
    some tensors otherwise on disk. ``model`` is it, unallocated."""

    shapes: dict[str, tuple[int, ...]]
    integers: frozenset[str]
    tied: frozenset[str]
    ignored: tuple[re.Pattern[str], ...]
    renamed: bool
    model: Any


def dense_config(config: Mapping[str, Any], where: str) -> Any:
    """The transformers config object of a dense config.json.

    Raises: UnreadableInput where transformers does not accept a value.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config["model_type"]
    known: Any = CONFIG_MAPPING[model_type]
    for name in config:
        if callable(getattr(known, name, None)) or name == "attribute_map":
            raise UnreadableInput(
                f"{where}: {name} is no setting of {model_type} models: remove it"
            )
    values = without_switches(config)
    values = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
    with building(f"{where} is no valid {model_type} config"):
        return AutoConfig.for_model(model_type, **values)


def expected_tensors(config: Any, where: str) -> Expected:
    """Names and shapes of the dense model's tensors, without allocating them.

    Raises: UnreadableInput where the config describes no model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    with building(f"{where} describes no model that can be built"):
        model = unallocated(config)
    renamed = get_model_conversion_mapping(model, add_legacy=False)
    state = model.state_dict()
    return Expected(
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        integers=frozenset(n for n, tensor in state.items() if not tensor.is_floating_point()),
        tied=frozenset(model.all_tied_weights_keys),
        ignored=tuple(map(re.compile, model._keys_to_ignore_on_load_unexpected or ())),
        renamed=bool(renamed),
        model=model,
    )


@contextmanager
def building(what: str) -> Iterator[None]:
    """Let whatever transformers raises, in building something from a file, be that file's fault.

    Args:
        what: the file, and what is wrong if transformers fails.
    Raises: UnreadableInput with the library's reason.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except HysparseError:
        raise
    except Exception as error:
        raise UnreadableInput(f"{what}: {single_line(error)}") from error
    finally:
        logging.set_verbosity(before)


def unallocated(config: Any) -> Any:
    """The causal language model of a transformers config, on torch's meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )


def check_forward(model: Any, where: str) -> None:
    """Rotate the first positions for real, then run the model on shapes alone.

    Args:
        model: unallocated, of sizes that are known to be those of the weights.
    Raises: UnreadableInput where a rotation is not finite or a layer can't be computed.
    """
    import torch

    rotaries = {type(part): part for part in model.modules() if hasattr(part, "inv_freq")}
    with building(f"{where}: its rotary parameters can't be used"):
        for kind, part in rotaries.items():
            if part.inv_freq.numel() > _MOST_FREQUENCIES:
                raise ValueError(f"they are of {part.inv_freq.numel()} frequencies")
            for turned in kind(part.config)(torch.zeros(1, 2, 1), torch.arange(2)[None]):
                if not torch.isfinite(turned).all():
                    raise ValueError("they give no finite numbers")
    model.config._experts_implementation = "batched_mm"  # of the ways, the one of shapes alone
    with building(f"{where} describes no model that can be run"), torch.device("meta"):
        mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
        model(torch.zeros(1, 2, dtype=torch.long), attention_mask=mask, use_cache=False)


def check_tensors(checkpoint: Checkpoint, expected: Expected) -> list[str]:
    """Check names and shapes; the names that transformers will not use are returned.

    Where a family names tensors otherwise on disk, or splits them as it does experts, those whose
    names differ are compared by how many numbers each layer holds.

    Raises: UnreadableInput naming the first tensor that is missing, has another shape, holds
        integers where the model has floats or the reverse, or has the name of one that HySparse
        adds.
    """
    stored = checkpoint.tensors
    for name, tensor in stored.items():
        if _OURS.search(name):
            raise UnreadableInput(
                f"{tensor.shard}: tensor {printable(name)} has the name of one that HySparse adds: "
                "give the dense checkpoint, or the config.json of the converted one"
            )
        if name in expected.shapes or expected.renamed:
            _check_kind(tensor, floats=name not in expected.integers)
    for name, shape in expected.shapes.items():
        if name in stored and stored[name].shape != shape:
            raise UnreadableInput(
                f"{stored[name].shard}: tensor {name} has shape "
                f"{printable(list(stored[name].shape))}, but config.json makes it "
                f"{printable(list(shape))}: config and weights do not belong together"
            )
    missing = [name for name in expected.shapes if name not in stored and name not in expected.tied]
    unused = [
        name
        for name in stored
        if name not in expected.shapes
        and not _DERIVED.search(name)
        and not any(pattern.search(name) for pattern in expected.ignored)
    ]
    if missing and expected.renamed:
        have = _numbers({name: stored[name].shape for name in unused})
        need = _numbers({name: expected.shapes[name] for name in missing})
        if have == need:
            return []
        layer = min(key for key in have | need if have[key] != need[key])
        raise UnreadableInput(
            f"{checkpoint.folder}: the tensors of {f'layer {layer}' if layer else 'no layer'} hold "
            f"{have[layer]} numbers where config.json makes it {need[layer]}: a tensor is missing "
            "or of another shape"
        )
    if missing:
        raise UnreadableInput(
            f"{checkpoint.folder}: tensor {missing[0]} is missing ({len(missing)} such): config "
            "and weights do not belong together, or the download is incomplete"
        )
    return unused


def _check_kind(tensor: StoredTensor, *, floats: bool) -> None:
    if (tensor.dtype in FLOATS) != floats and not _DERIVED.search(tensor.name):
        raise UnreadableInput(
            f"{tensor.shard}: tensor {printable(tensor.name)} is {printable(tensor.dtype)}, but "
            f"the model has {'floats' if floats else 'integers'} there: save the checkpoint again"
        )


def _numbers(shapes: Mapping[str, Iterable[int]]) -> Counter[str]:
    """Layer -> how many numbers its tensors hold; layer "" is outside of all layers."""
    counts: Counter[str] = Counter()
    for name, shape in shapes.items():
        found = _LAYER.search(name)
        count = 1
        for size in shape:
            count *= size
        counts[found[1] if found else ""] += count
    return counts
