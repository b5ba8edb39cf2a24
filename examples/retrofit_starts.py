"""The starts that the retrofit study heals: what ``hysparse convert`` is told for each."""

from typing import Any

SWA, SWAP_9 = {"layout": "hybrid-swa"}, {"swap_attention": [[8, 9]]}
ONE_TO_3 = {"pattern": "FSSSFSSSFSSF"}
CHOSEN = {"pattern": "FSSSSSSSSFFF"}  # by --strategy dp
STARTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "hysparse 1:3": ONE_TO_3,
    "hysparse 1:3 swapped": ONE_TO_3 | SWAP_9,
    "hybrid-swa 1:3 swapped": ONE_TO_3 | SWAP_9 | SWA,
    "hysparse 1:3 chosen": CHOSEN,
    "hybrid-swa 1:3 chosen": CHOSEN | SWA,
    "hysparse 1:11 swapped": {"pattern": "FSSSSSSSSSSF", "swap_attention": [[11, 9]]},
}
