"""Swaps the dense attention of two layers, so that another sits in a layer that stays full.

Far retrieval sits in few layers of a dense model. Where the pattern makes one of them sparse, its
attention can trade places with that of a full layer nearby: both read and write the same residual
stream. It costs nothing when running; the tensors only get each other's names.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from hysparse_cli.errors import InvalidRecipe, UnsupportedModel
from hysparse_cli.families import Family

Pair = tuple[int, int]
Item = TypeVar("Item")


def check_family(family: Family, model_type: str) -> None:
    """Refuse a family whose attention can't move alone.

    Raises: UnsupportedModel.
    """
    if family.attention_norms is None:
        raise UnsupportedModel(
            f"swap_attention: in {model_type} models attention and MLP read the same norm, so that "
            "neither can move alone: leave it out"
        )


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


def exchanged(by_layer: Sequence[Item], pairs: Sequence[Pair]) -> tuple[Item, ...]:
    """What each layer has of its attention, such as its window, once pairs have swapped."""
    items = list(by_layer)
    for a, b in pairs:
        items[a], items[b] = items[b], items[a]
    return tuple(items)


def renamed(tensors: Iterable[str], pairs: Sequence[Pair], family: Family) -> dict[str, str]:
    """The new names of those of ``tensors`` that belong to the attention of a swapped layer."""
    places: dict[str, str] = {}
    for a, b in _both_ways(pairs):
        places |= zip(_places(family, a), _places(family, b), strict=True)
    return {
        name: places[place] + name.removeprefix(place)
        for name in tensors
        for place in places
        if name.startswith(place)
    }


def swap_in_place(model: Any, pairs: Sequence[Pair], family: Family) -> None:
    """Swap the attention modules of a loaded dense model, their norms and their windows."""
    for a, b in pairs:
        places = [_places(family, layer) for layer in (a, b)]
        for here, there in zip(*places, strict=True):
            modules = [model.get_submodule(place.rstrip(".")) for place in (here, there)]
            for place, module in zip((there, here), modules, strict=True):
                parent, _, name = place.rstrip(".").rpartition(".")
                setattr(model.get_submodule(parent), name, module)
        for layer in (a, b):
            model.get_submodule(family.attention.format(layer=layer)).layer_idx = layer
    if pairs and (kinds := getattr(model.config, "layer_types", None)) is not None:
        model.config.layer_types = list(exchanged(kinds, pairs))  # which says what mask it gets


def _places(family: Family, layer: int) -> list[str]:
    assert family.attention_norms is not None, "check_family looks before"
    attention, beside = (path.format(layer=layer) for path in (family.attention, family.layer))
    return [f"{attention}.", *(f"{beside}.{norm}." for norm in family.attention_norms)]


def _both_ways(pairs: Sequence[Pair]) -> Iterator[Pair]:
    for a, b in pairs:
        yield a, b
        yield b, a
