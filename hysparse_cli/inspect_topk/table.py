"""Draws an inspection on one screen: a row for each full layer, and the needle's verdict.

Maps, single sparse layers, overlap and the needle by layer are in the files and the JSON.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean
from textwrap import shorten
from typing import TYPE_CHECKING

from hysparse_cli.inspect_topk.needle import AS_IT_IS, FULL, OWN_KEYS, Effect
from hysparse_cli.inspect_topk.result import FullLayer, Inspection, Needle, ServedLayer
from hysparse_cli.inspect_topk.statistics import Fit

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

FAR = 3  # the bin of distances that begins 4 blocks back
NEEDLE_LETTERS = 48
# column -> field of a Fit, of the selection and by chance
FIGURES = {
    "recall": ("recall", "recall_random"),
    "mass": ("mass_selected", "mass_random"),
    "even": ("mass_even", None),
    "best": ("mass_own_best", None),
}


def as_table(found: Inspection) -> "Group":
    """What ``found`` says, in 80 columns: about 20 lines, of which one for each full layer."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Table | Text] = [Text(_headline(found)), Text()]
    if _fits(found.served_layers):
        parts += [_full_layers(found), Text()]
        parts += [Text(_meaning(found), style="italic"), Text()]
    else:
        every = f"Up to {found.spec.top_k_tokens:,} tokens every block is selected"
        parts += [Text(f"{every}: give a longer text to see recall and mass."), Text()]
    if found.needle is not None:
        parts += [Text(_verdict(found, found.needle)), Text()]
    return Group(*parts, Text(_more(found)))


def _headline(found: Inspection) -> str:
    spec = found.spec
    how = "dense, as if it were" if found.kind == "dense" else "as it is,"
    return (
        f"{found.checkpoint} ({how} {spec.pattern})\n{found.tokens:,} tokens of {found.source}, "
        f"top {spec.top_k_blocks} of up to {found.num_blocks} blocks of {spec.block_size}"
    )


def _full_layers(found: Inspection) -> "Table":
    from rich import box

    from hysparse_cli.tables import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    names = ["layer", "serves", " kept", "far"]
    for group in _fits(found.served_layers):
        names += [f"{group:>8}\nrecall", "mass", "even", "best"]
    for name in (*names, "  worst"):
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for full in found.full_layers:
        served = [layer for layer in found.served_layers if layer.server == full.layer]
        shown = _figures([full], served, by_chance=False)
        table.add_row(str(full.layer), _span(full.serves), *shown, _worst(served))
    shown = _figures(found.full_layers, found.served_layers, by_chance=True)
    table.add_row("chance", "", *shown, "")
    return table


def _fits(served: Sequence[ServedLayer]) -> dict[str, list[Fit]]:
    """Over all queries that choose, and over those that predict an answer, where there are any."""
    fits = {
        "all:": [layer.fit for layer in served],
        "answers:": [layer.answer_fit for layer in served],
    }
    known = {name: [fit for fit in found if fit is not None] for name, found in fits.items()}
    return {name: found for name, found in known.items() if found}


def _figures(
    full_layers: Sequence[FullLayer], served: Sequence[ServedLayer], *, by_chance: bool
) -> list[str]:
    """Means over KV heads and ``served``: of what was selected, or of as many random blocks."""
    moves = [head.movement for full in full_layers for head in full.heads if head.movement]
    kept = [move.kept_random[0] if by_chance else move.kept[0] for move in moves]
    far = [move.distances_random if by_chance else move.distances for move in moves]
    cells = [_mean(kept), _mean(sum(bins[FAR:]) for bins in far)]
    for fits in _fits(served).values():
        for fields in FIGURES.values():
            field = fields[by_chance]
            cells.append("" if field is None else _mean(getattr(fit, field) for fit in fits))
    return cells


def _worst(served: Sequence[ServedLayer]) -> str:
    """The layer that sees the least of what its own best blocks hold, and how much."""
    seen = {
        layer.layer: fit.mass_seen / max(fit.mass_own_best, 1e-9)
        for layer in served
        if (fit := layer.answer_fit or layer.fit) is not None
    }
    worst = min(seen, key=lambda layer: seen[layer])
    return f"{worst}: {seen[worst]:.0%}"


def _meaning(found: Inspection) -> str:
    queries = {name: fits[0].queries for name, fits in _fits(found.served_layers).items()}
    of_answers = ""
    if "answers:" in queries:
        of_answers = f"; answers: those of them that predict an answer ({queries['answers:']:,})"
    return (
        f"Means over heads and sparse layers. all: {queries['all:']:,} queries that see more than "
        f"{found.spec.top_k_tokens:,} tokens{of_answers}. kept: the token before had selected it "
        "too; far: 4 or more blocks back; recall: a sparse layer's own top blocks that are "
        "selected; mass: its own attention on the selection, on evenly spaced blocks, on its own "
        "best; worst: the layer that sees (with its window) least of what its own best blocks hold"
    )


def _verdict(found: Inspection, needle: Needle) -> str:
    """Whether the answer is still found from what is selected, and who misses the needle."""
    effects = needle.effects
    selected = OWN_KEYS if found.kind == "dense" else AS_IT_IS
    dense = next(effect for effect in effects if effect.attention == FULL)
    before, forced = [effect for effect in effects if effect.attention == selected][:2]
    if before.next_token == dense.next_token:
        verdict = "still found"
    elif forced.next_token == dense.next_token:
        verdict = "lost by the selection"
    else:
        verdict = "lost even where it is selected"
    sparse = {layer.layer for layer in found.served_layers}
    looks = [
        (at.block, layer) for at in needle.blocks for layer in at.layers if layer.layer in sparse
    ]
    block, reader = max(looks, key=lambda found: found[1].top_head_mass)
    what = shorten(needle.text.strip(), NEEDLE_LETTERS, placeholder="...")
    said = "its answer has" if needle.answer else "the next token is"
    how = "only the selected blocks" if selected == OWN_KEYS else "the model as it is"
    return (
        f"Needle {what!r} is {verdict}: {said} {_answer(dense)} with full attention, "
        f"{_answer(before)} with {how}, {_answer(forced)} with the needle forced into the "
        f"selections. Sparse layer {reader.layer} looks for it most: {reader.top_head_mass:.0%} of "
        f"one head's attention is on block {block}, and {_mean([reader.selected_for_top_head])} of "
        "that head's lists have it."
    )


def _answer(effect: Effect) -> str:
    """The probability of the answer; without one, of the likeliest next token."""
    if effect.probability is not None:
        return f"{effect.probability:.1%}"
    return f"{effect.next_token!r} {effect.next_probability:.0%}"


def _more(found: Inspection) -> str:
    written = [
        str(path) for path in (found.options.html, found.options.png, found.options.npz) if path
    ]
    place = ", ".join(written) or "give --html PAGE (or --png, --npz, --json)"
    return f"Maps, overlap, single layers: {place}"


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _mean(shares: Iterable[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{fmean(known):.0%}" if known else "-"
