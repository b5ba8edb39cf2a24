"""Reads and judges requirements such as ``loss<=dense+0.01``."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hysparse_cli.errors import InvalidRecipe

DENSE = "dense"
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Requirement:
    """``metric operator reference + number``; without a reference the number alone.

    reference: a checkpoint's name, or DENSE for the first dense one.
    """

    text: str
    metric: str
    operator: str
    reference: str | None
    number: float


@dataclass(frozen=True)
class Verdict:
    """What a requirement found: ``value`` against ``bound``, for the checkpoint at a place."""

    requirement: Requirement
    place: int
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return _OPERATORS[self.requirement.operator](self.value, self.bound)


def parse_requirements(
    texts: Sequence[str], names: Sequence[str], metrics: Sequence[str]
) -> list[Requirement]:
    """Read requirements: METRIC, one of <= >= < >, then NUMBER or REFERENCE or REFERENCE±NUMBER.

    Args:
        names: what the checkpoints are called, in their order; "dense" is known besides.
        metrics: what will be measured. Lengths may be written as 8192 or 8k.
    Raises: InvalidRecipe naming every one that can't be read.
    """
    requirements: list[Requirement] = []
    errors: list[str] = []
    for text in texts:
        try:
            requirements.append(_parse(text, names, metrics))
        except ValueError as error:
            errors.append(f"require {text!r}: {error}")
    if errors:
        raise InvalidRecipe("; ".join(errors))
    return requirements


def _parse(text: str, names: Sequence[str], metrics: Sequence[str]) -> Requirement:
    parts = re.fullmatch(r"\s*([^<>=\s]+)\s*(<=|>=|<|>)\s*([^<>=]*?)\s*", text)
    if parts is None:
        raise ValueError("not METRIC<=NUMBER or METRIC<=CHECKPOINT+NUMBER (or >=, <, >)")
    metric = re.sub(r"@([0-9]+)[kK]?$", _length, parts[1])
    if metric not in metrics:
        raise ValueError(f"{parts[1]} is not measured; measured: {', '.join(metrics)}")
    # names may hold signs and digits: the longest that fits is meant
    known = sorted({DENSE, *names}, key=len, reverse=True)
    pattern = rf"({'|'.join(map(re.escape, known))})?\s*(?:([+-]?)\s*({_NUMBER}))?"
    bound = re.fullmatch(pattern, parts[3])
    if bound is None or not (bound[1] or bound[3]) or (bound[1] and bound[3] and not bound[2]):
        raise ValueError(
            f"{parts[3]!r} is neither a number nor a checkpoint ({', '.join(sorted(known))}) with "
            "a number added or taken away"
        )
    number = float(f"{bound[2] or ''}{bound[3] or 0}")
    if bound[1] and len(names) == 1:
        raise ValueError(f"there is no other checkpoint to compare {names[0]} with: give one")
    return Requirement(text, metric, parts[2], bound[1], number)


def _length(found: re.Match[str]) -> str:
    tokens = int(found[1]) * (1024 if found[0][-1] in "kK" else 1)
    return f"@{length_name(tokens)}"


def length_name(tokens: int) -> str:
    """``8k`` for 8192; other lengths as they are."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def judge(
    requirements: Sequence[Requirement],
    found: Sequence[Mapping[str, float]],
    places: Mapping[str, int],
) -> list[Verdict]:
    """What each requirement says of each checkpoint that it is for.

    It is for every checkpoint but its reference; without one, for all but the first, or for the
    only one.

    Args:
        found: each checkpoint's metrics. places: of the references in ``found``.
    """
    verdicts = []
    for requirement in requirements:
        reference = None if requirement.reference is None else places[requirement.reference]
        base = 0.0 if reference is None else found[reference].get(requirement.metric, math.nan)
        for place, metrics in enumerate(found):
            if place != (reference or 0) or len(found) == 1:
                verdicts.append(
                    Verdict(
                        requirement,
                        place,
                        metrics.get(requirement.metric, math.nan),
                        base + requirement.number,
                    )
                )
    return verdicts
