"""An inspection for a terminal of 80 columns: heatmaps that read without colour, and tables."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hysparse_cli.inspect_topk.effects import Effect
from hysparse_cli.inspect_topk.fit import Fit
from hysparse_cli.inspect_topk.maps import Map, mean_map, smaller
from hysparse_cli.inspect_topk.needle import LayerNeedle
from hysparse_cli.inspect_topk.result import (
    FullLayer,
    Inspection,
    Needle,
    NeedleBlock,
)

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

# share above which a cell looks so; the shade reads without colour too
SHADES = ((0.75, "█", "bright_yellow"), (0.5, "▓", "orange1"), (0.25, "▒", "deep_pink3"))
FAINT, NEVER, HIDDEN = ("░", "purple4"), ("·", "grey35"), " "
OVERLAP_SHADES = (
    (0.9, "█", "bright_yellow"),
    (0.75, "▓", "orange1"),
    (0.6, "▒", "deep_pink3"),
    (0.4, "░", "purple4"),
    (0.0, "·", "grey35"),
)
MOST_HEADS = 3  # maps side by side
MOST_OVERLAP_LAYERS = 76  # a column a layer
MOST_WRITTEN_LAYERS = 25  # three


def as_table(found: Inspection) -> "Group":
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(_headline(found))]
    for full in found.full_layers:
        parts += [Text(), *_full_layer(found, full)]
    parts += [Text(), _legend("Down: queries, right: keys. Selected:")]
    parts += _served(found, "choose", [layer.fit for layer in found.served_layers])
    at_answers = [layer.answer_fit for layer in found.served_layers]
    if any(fit is not None for fit in at_answers):
        parts += _served(found, "answer", at_answers)
    if any(layer.branches is not None for layer in found.served_layers):
        parts += _branches(found)
    for queries, overlap in (("choose", found.overlap), ("answer", found.answer_overlap)):
        if overlap is not None and len(overlap) <= MOST_OVERLAP_LAYERS:
            parts += [Text(), *_overlap(queries, overlap, found.spec.pattern)]
    if found.needle is not None:
        parts += _needle(found, found.needle)
    return Group(*parts)


def _headline(found: Inspection) -> str:
    spec = found.spec
    how = "dense, as if it were" if found.kind == "dense" else "as it is,"
    return (
        f"{found.checkpoint} ({how} {spec.pattern})\n{found.tokens:,} tokens of {found.source}, "
        f"top {spec.top_k_blocks} of up to {found.num_blocks} blocks of {spec.block_size}"
    )


def _full_layer(found: Inspection, full: FullLayer) -> list[Any]:
    from rich.columns import Columns
    from rich.text import Text

    title = f"Layer {full.layer}, serves {', '.join(map(str, full.serves))}"
    lines = [Text(title, style="bold")]
    moves = [head.movement for head in full.heads if head.movement is not None]
    kept = [move.kept[0] for move in moves if move.kept[0] is not None]
    if moves and kept and moves[0].kept_random[0] is not None:
        mean = sum(kept) / len(kept)
        far = sum(sum(move.distances[3:]) for move in moves) / len(moves)
        lines.append(
            Text(
                f"the token before had chosen {mean:.0%} of a token's blocks (chance "
                f"{moves[0].kept_random[0]:.0%}); {far:.0%} are 4 or more blocks back (chance "
                f"{sum(moves[0].distances_random[3:]):.0%})"
            )
        )
    maps = [(f"KV head {i}", head.map) for i, head in enumerate(full.heads)]
    if len(maps) > MOST_HEADS:
        maps = [(f"mean of {len(maps)} KV heads", mean_map([head.map for head in full.heads]))]
    size = found.tokens, found.spec.block_size
    return [*lines, Columns([_heatmap(name, smaller(cells, *size)) for name, cells in maps])]


def _heatmap(title: str, cells: Map) -> "Text":
    from rich.text import Text

    picture = Text(title.ljust(len(cells[0])))
    for row in cells:
        picture.append("\n")
        for value in row:
            picture.append(*shade(value))
    return picture


def shade(value: float | None) -> tuple[str, str]:
    """The letter and the colour of a share."""
    if value is None:
        return HIDDEN, ""
    for least, letter, style in SHADES:
        if value > least:
            return letter, style
    return FAINT if value > 0 else NEVER


def _legend(what: str) -> "Text":
    from rich.text import Text

    legend = Text(f"{what} ")
    legend.append(*NEVER).append(" never ").append(*FAINT).append(" some")
    for least, letter, style in reversed(SHADES):
        legend.append(" ").append(letter, style).append(f" >{least:.0%}")
    return legend


def _served(found: Inspection, queries: str, fits: Sequence[Fit | None]) -> list[Any]:
    columns = ("layer", "by", "recall", "chance", "even", "mass", "best", "chance", "even")
    rows = []
    for layer, fit in zip(found.served_layers, fits, strict=True):
        cells = ["-"] * 10
        if fit is not None:
            recalls = (fit.recall, fit.recall_random, fit.recall_even)
            masses = (fit.mass_selected, fit.mass_own_best, fit.mass_random, fit.mass_even)
            covered = (fit.mass_window, fit.mass_seen, fit.mass_first_block)
            cells = [f"{share:.0%}" for share in (*recalls, *masses, *covered)]
        rows.append((str(layer.layer), str(layer.server), *cells))
    below = _served_caption(found, [fit for fit in fits if fit is not None])
    title = f"Served layers, queries that {queries}"
    return _titled(title, (*columns, "window", "seen", "1st"), rows, below)


def _served_caption(found: Inspection, fits: list[Fit]) -> str:
    kept = f"{found.spec.top_k_tokens:,} tokens"
    if not fits:
        return f"up to {kept} every block is selected: give a longer text to see recall and mass"
    queries, sink = fits[0].queries, sum(fit.mass_sink for fit in fits) / len(fits)
    over = "one query that sees" if queries == 1 else f"{queries:,} queries that see"
    of_sink = f"; the family's own sinks take {sink:.0%}" if sink > 0.0005 else ""
    return (
        f"means over {over} more than {kept}; recall: of own top blocks, by chance, of evenly "
        "spaced ones; mass: of own attention on the selection, own best blocks, chance, evenly "
        f"spaced ones, window, selection and window, first block{of_sink}"
    )


def _branches(found: Inspection) -> list[Any]:
    rows = [
        (
            str(layer.layer),
            f"{layer.branches.gate_sparse:.2f} {layer.branches.gate_window:.2f}",
            f"{layer.branches.sink_sparse:.1%} {layer.branches.sink_window:.1%}",
        )
        for layer in found.served_layers
        if layer.branches is not None
    ]
    title = "Branches of the sparse layers: block-sparse, window"
    below = "means over all queries and heads; to sinks: of each branch's softmax"
    return _titled(title, ("layer", "gates", "to sinks"), rows, below)


def _overlap(queries: str, overlap: list[list[float]], pattern: str) -> list[Any]:
    """Per cent where so many columns fit, shades where not."""
    from rich.text import Text

    title = Text(f"Overlap, queries that {queries}: of a layer's mass (column) on its own best\n")
    title.append("blocks, how much is on those of an earlier layer (row)").stylize("bold")
    written = len(overlap) <= MOST_WRITTEN_LAYERS
    layers = range(len(overlap))
    header = "".join(f"{layer:3}" if written else pattern[layer] for layer in layers)
    picture = Text(f"    {header}")
    for a, row in enumerate(overlap):
        picture.append(f"\n{a:>2}{pattern[a]} ")
        for b, value in enumerate(row):
            letter, style = _overlap_shade(value) if b > a else (HIDDEN, "")
            cell = f"{100 * value:3.0f}" if b > a else "   "
            picture.append(cell if written else letter, style)
    legend = Text()
    for least, letter, style in reversed(OVERLAP_SHADES):
        legend.append(letter, style).append(f" >{least:.0%} ")
    return [title, picture] if written else [title, picture, legend]


def _overlap_shade(value: float) -> tuple[str, str]:
    for least, letter, style in OVERLAP_SHADES:
        if value > least:
            return letter, style
    return OVERLAP_SHADES[-1][1:]


def _needle(found: Inspection, needle: Needle) -> list[Any]:
    from rich.text import Text

    begin, end = needle.tokens
    what = "the next token" if not needle.answer else f"the answer {needle.answer.strip()!r}"
    first, last = needle.queries[0], needle.queries[-1]
    asked = f"query {first}" if first == last else f"queries {first} to {last}"
    parts: list[Any] = [
        Text(),
        Text(f"Needle {needle.text.strip()!r}", style="bold"),
        Text(f"tokens {begin} to {end - 1}; looked for by {what} ({asked})"),
    ]
    for block in needle.blocks:
        parts += _needle_block(found, block, is_last=block is needle.blocks[-1])
    return parts + _effects(found, needle.effects)


def _needle_block(found: Inspection, block: NeedleBlock, *, is_last: bool) -> list[Any]:
    size = found.spec.block_size
    begin, end = block.block * size, min((block.block + 1) * size, found.tokens) - 1
    columns = ["layer", "mass", "top head", "rank", "listed", "for it", "ever"]
    if found.kind == "converted":
        columns += ["gate", "read", "top head"]
    rows = [_needle_cells(found, layer) for layer in block.layers]
    below = _needle_caption(found) if is_last else ""
    return _titled(f"Block {block.block}, tokens {begin} to {end}", columns, rows, below)


def _needle_caption(found: Inspection) -> str:
    read = "; read: gate times what the branch gives the block"
    return (
        "mass: of own attention at those queries; rank: among the blocks they see; listed: in the "
        "lists of those queries, in those for the top head, in those of all queries"
        + (read if found.kind == "converted" else "")
    )


def _needle_cells(found: Inspection, layer: LayerNeedle) -> list[str]:
    kind = found.spec.pattern[layer.layer]
    cells = [f"{layer.layer} {kind}", f"{layer.mass:.1%}", f"{layer.top_head_mass:.1%}"]
    cells.append(f"{layer.rank:.0f}")
    lists = (layer.selected, layer.selected_for_top_head, layer.selected_ever)
    cells += [_share(share) for share in lists]
    if found.kind == "converted":
        cells.append("-" if layer.gate is None else f"{layer.gate:.2f}")
        cells += [_share(layer.read, 1), _share(layer.top_head_read, 1)]
    return cells


def _effects(found: Inspection, effects: list[Effect]) -> list[Any]:
    rows = []
    for effect in effects:
        into = ", ".join(map(str, effect.forced_into)) or "-"
        nats = "-" if effect.nats is None else f"{effect.nats:.3f}"
        next_token = f"{effect.next_token!r} {effect.next_probability:.0%}"
        rows.append((effect.attention, into, nats, _share(effect.probability, 1), next_token))
    columns = ("sparse layers", "forced into", "nats", "probability", "likeliest next")
    below = (
        "own keys: those at the selected blocks and in the window, no gates; as it is: shared keys "
        "and values, gates and sinks; nats: of the answer's tokens"
    )
    if found.kind == "converted":
        below += "; full attention and own keys read far keys that healing leaves as they were"
    title = "What becomes of it with the needle's blocks forced into selections"
    return _titled(title, columns, rows, below)


def _share(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _titled(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], below: str
) -> list[Any]:
    """A table, and what to read it with: as wide as the terminal, however narrow the table."""
    from rich import box
    from rich.text import Text

    from hysparse_cli.tables import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    parts = [Text(), Text(title, style="bold"), table]
    return [*parts, Text(below, style="italic")] if below else parts
