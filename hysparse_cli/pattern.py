"""Says which layers are full, which are sparse, and who serves whom.

A pattern is one letter a layer: ``F`` full attention, ``S`` sparse attention. A full attention
layer and the sparse ones that follow it are a hybrid block (paper, section 3.1): it serves them its
keys, values and selected block indices.
"""

import re
from dataclasses import dataclass

from hysparse_cli.errors import InvalidRecipe
from hysparse_cli.printable import printable

FULL, SPARSE = "F", "S"


@dataclass(frozen=True)
class Pattern:
    """A validated pattern, such as ``Pattern("FSSSF")``.

    Raises: InvalidRecipe where the pattern is empty, has other letters or does not begin with F.
    """

    pattern: str

    def __post_init__(self) -> None:
        if not self.pattern:
            raise InvalidRecipe("pattern is empty: give one letter a layer, such as FSSSF")
        if unknown := sorted(set(self.pattern) - {FULL, SPARSE}):
            raise InvalidRecipe(
                f"pattern {printable(repr(self.pattern))} has "
                f"{printable(', '.join(map(repr, unknown)))}: "
                "only F (full attention) and S (sparse attention) are known"
            )
        if self.pattern[0] != FULL:
            raise InvalidRecipe(
                f"pattern {printable(repr(self.pattern))} begins with a sparse layer, which no "
                "full layer serves: layer 0 must be F"
            )

    def __len__(self) -> int:
        return len(self.pattern)

    @property
    def full_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.pattern) if kind == FULL)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.pattern) if kind == SPARSE)

    def server_of(self, layer: int) -> int:
        """The full attention layer whose keys, values and block indices ``layer`` reads."""
        return self.pattern.rindex(FULL, 0, layer + 1)

    def serves(self, layer: int) -> bool:
        """Whether ``layer`` is a full attention layer that sparse ones follow."""
        return self.pattern[layer : layer + 2] == FULL + SPARSE

    def served_by(self, full_layer: int) -> tuple[int, ...]:
        """The sparse attention layers of the hybrid block that ``full_layer`` opens."""
        return tuple(i for i in self.sparse_layers if self.server_of(i) == full_layer)


def from_ratio(ratio: str, num_layers: int, *, last_layer_full: bool = True) -> Pattern:
    """The paper's uniform pattern: hybrid blocks of ``full:sparse`` layers, the last layer full.

    ``from_ratio("1:3", 12)`` is ``FSSSFSSSFSSF``.

    Raises: InvalidRecipe where ``ratio`` is not ``1:N`` with N >= 0.
    """
    found = re.fullmatch(r"\s*1\s*:\s*([0-9]{1,9})\s*", ratio)
    if not found:
        raise InvalidRecipe(f"ratio {printable(repr(ratio))} is not of the form 1:N, such as 1:3")
    block = FULL + SPARSE * min(int(found[1]), num_layers)
    pattern = (block * (num_layers // len(block) + 1))[:num_layers]
    if last_layer_full:
        pattern = pattern[:-1] + FULL
    return Pattern(pattern)


def names_sparse(pattern: object) -> bool:
    """Whether a pattern as a file has it, valid or not, names a sparse layer."""
    return SPARSE in str(pattern)


def uniform(num_full: int, num_layers: int) -> Pattern:
    """The paper's pattern with ``num_full`` full layers, the last one full.

    Where no ratio gives so many, they are spread evenly.
    """
    for sparse in range(num_layers):
        pattern = from_ratio(f"1:{sparse}", num_layers)
        if len(pattern.full_layers) == num_full:
            return pattern
    even = [round(i * (num_layers - 1) / max(1, num_full - 1)) for i in range(num_full)]
    return from_full_layers(even, num_layers)


def from_full_layers(
    full_layers: list[int], num_layers: int, *, last_layer_full: bool = True
) -> Pattern:
    """The pattern whose full attention layers are ``full_layers`` and, unless told not, the last.

    Raises: InvalidRecipe where a layer is out of range or layer 0 is not among them.
    """
    if outside := [i for i in full_layers if not 0 <= i < num_layers]:
        raise InvalidRecipe(
            f"full_layers has {', '.join(map(str, outside))}, but the model's layers are "
            f"0 to {num_layers - 1}"
        )
    full = {*full_layers, num_layers - 1} if last_layer_full else set(full_layers)
    return Pattern("".join(FULL if i in full else SPARSE for i in range(num_layers)))


def from_pattern(pattern: str, num_layers: int) -> Pattern:
    """``pattern`` as it is spelled out, one letter a layer, upper or lower case.

    Raises: InvalidRecipe where its length is not the model's number of layers.
    """
    found = Pattern(pattern.strip().upper())
    if len(found) != num_layers:
        raise InvalidRecipe(
            f"pattern {found.pattern!r} has {len(found)} letters, but the model has "
            f"{num_layers} layers"
        )
    return found
