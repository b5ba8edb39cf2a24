"""The starts that the retrofit study heals: what ``hysparse convert`` is told for each."""

from typing import Any, NamedTuple


class Start(NamedTuple):
    """options: of ``hysparse convert``, None for the dense model. rate_of: whose learning rate it
    takes, itself where it is swept. seeds, long_seeds: how often it heals with 4M and 21M tokens.
    """

    options: dict[str, Any] | None
    rate_of: str
    seeds: int
    long_seeds: int = 0


ONE_TO_3, ONE_TO_11 = {"pattern": "FSSSFSSSFSSF"}, {"pattern": "FSSSSSSSSSSF"}
CHOSEN = {"pattern": "FSSSSSSSSFFF"}  # by --strategy dp
SWAPPED_3 = ONE_TO_3 | {"swap_attention": [[8, 9]]}
SWAPPED_11 = ONE_TO_11 | {"swap_attention": [[11, 9]]}
SWA, SMALL = {"layout": "hybrid-swa"}, {"top_k_tokens": 256}

STARTS = {
    "dense": Start(None, "dense", 3, 3),
    "hysparse 1:3": Start(SWAPPED_3, "hysparse 1:3", 3, 3),
    "hysparse 1:11": Start(SWAPPED_11, "hysparse 1:11", 3, 3),
    "hysparse 1:3 chosen": Start(CHOSEN, "hysparse 1:3", 3, 1),
    "hysparse 1:3 uniform": Start(ONE_TO_3, "hysparse 1:3", 1),
    "hybrid-swa 1:3": Start(SWAPPED_3 | SWA, "hysparse 1:3", 1),
    "hybrid-swa 1:3 chosen": Start(CHOSEN | SWA, "hysparse 1:3", 1),
    "hybrid-swa 1:11": Start(SWAPPED_11 | SWA, "hysparse 1:11", 1),
    "hysparse 1:3 k=256": Start(SWAPPED_3 | SMALL, "hysparse 1:3", 1),
    "hysparse 1:11 k=256": Start(SWAPPED_11 | SMALL, "hysparse 1:11", 1),
}
