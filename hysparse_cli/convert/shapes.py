"""Does a checkpoint hold what its config promises? Compared with the dense model, unallocated."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hysparse_cli.checkpoint import Checkpoint
from hysparse_cli.errors import UnreadableInput
from hysparse_cli.foreign import without_kernels

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")


@dataclass(frozen=True)
class Expected:
    """What the dense model has: ``tied`` tensors need not be on disk; ``ignored`` are known
    leftovers; ``renamed`` families name or split some tensors otherwise on disk."""

    shapes: dict[str, tuple[int, ...]]
    tied: frozenset[str]
    ignored: tuple[re.Pattern[str], ...]
    renamed: bool


def dense_config(config: Mapping[str, Any], where: str) -> Any:
    """The transformers config object of a dense config.json.

    Raises: UnreadableInput where transformers does not accept a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = without_kernels(config)
    values = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
    try:
        return AutoConfig.for_model(config["model_type"], **values)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableInput(
            f"{where} is no valid {config['model_type']} config: {reason}"
        ) from None


def expected_tensors(config: Any, where: str) -> Expected:
    """Names and shapes of the dense model's tensors, without allocating them.

    Raises: UnreadableInput where the config describes no model.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableInput(f"{where} describes no model that can be built: {reason}") from None
    renamed = get_model_conversion_mapping(model, add_legacy=False)
    return Expected(
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        tied=frozenset(model.all_tied_weights_keys),
        ignored=tuple(map(re.compile, model._keys_to_ignore_on_load_unexpected or ())),
        renamed=bool(renamed),
    )


def check_tensors(checkpoint: Checkpoint, expected: Expected) -> list[str]:
    """Check names and shapes; the names that transformers will not use are returned.

    Where a family names tensors otherwise on disk, or splits them as it does experts, those whose
    names differ are compared by how many numbers each layer holds.

    Raises: UnreadableInput naming the first tensor that is missing or has another shape.
    """
    stored = checkpoint.tensors
    for name, shape in expected.shapes.items():
        if name in stored and stored[name].shape != shape:
            raise UnreadableInput(
                f"{stored[name].shard}: tensor {name} has shape {list(stored[name].shape)}, but "
                f"config.json makes it {list(shape)}: config and weights do not belong together"
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
