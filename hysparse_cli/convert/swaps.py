"""Swapping the dense attention of two layers: which one sits in a layer that stays full.

Far retrieval sits in few layers of a dense model. Where the pattern makes one of them sparse, its
attention can trade places with that of a full layer nearby: both read and write the same residual
stream. It costs nothing when running; the tensors only get each other's names.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hysparse_cli.errors import InvalidRecipe, UnsupportedModel
from hysparse_cli.families import Family

Pair = tuple[int, int]


def check_pairs(pairs: Sequence[Pair], num_layers: int) -> None:
    """Refuse pairs that are not of two layers of the model, each in one pair.

    Raises: InvalidRecipe.
    """
    layers = [layer for pair in pairs for layer in pair]
    written = ",".join(f"{a}:{b}" for a, b in pairs)
    if outside := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise InvalidRecipe(
            f"swap_attention {written} has {', '.join(map(str, outside))}, but the model's layers "
            f"are 0 to {num_layers - 1}"
        )
    if len(set(layers)) < len(layers):
        raise InvalidRecipe(f"swap_attention {written} names a layer twice: each may swap once")


def renamed(
    tensors: Iterable[str], pairs: Sequence[Pair], family: Family, model_type: str
) -> dict[str, str]:
    """The new names of those of ``tensors`` that belong to the attention of a swapped layer.

    Raises: UnsupportedModel where attention shares its norm with the MLP.
    """
    places: dict[str, str] = {}
    for a, b in _both_ways(pairs):
        places |= zip(_places(family, model_type, a), _places(family, model_type, b), strict=True)
    return {
        name: places[place] + name.removeprefix(place)
        for name in tensors
        for place in places
        if name.startswith(place)
    }


def swap_in_place(model: Any, pairs: Sequence[Pair], family: Family) -> None:
    """Swap the attention modules of a loaded model, and their norms."""
    for a, b in pairs:
        places = [_places(family, model.config.model_type, layer) for layer in (a, b)]
        for here, there in zip(*places, strict=True):
            modules = [model.get_submodule(place.rstrip(".")) for place in (here, there)]
            for place, module in zip((there, here), modules, strict=True):
                parent, _, name = place.rstrip(".").rpartition(".")
                setattr(model.get_submodule(parent), name, module)
        for layer in (a, b):
            model.get_submodule(family.attention.format(layer=layer)).layer_idx = layer


def _places(family: Family, model_type: str, layer: int) -> list[str]:
    attention = family.attention.format(layer=layer)
    if family.attention_norms is None:
        raise UnsupportedModel(
            f"swap_attention: in {model_type} models attention and MLP read the same norm, so that "
            "neither can move alone: leave it out"
        )
    beside = attention.rpartition(".")[0]
    return [f"{attention}.", *(f"{beside}.{norm}." for norm in family.attention_norms)]


def _both_ways(pairs: Sequence[Pair]) -> Iterator[Pair]:
    for a, b in pairs:
        yield a, b
        yield b, a
