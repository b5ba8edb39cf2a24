"""Draws an inspection as one picture: overlap, selections, how sparse layers are served."""

from typing import TYPE_CHECKING, Any

from hysparse_cli.inspect_topk.result import FullLayer, Inspection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "Blues"
MAPS_ABREAST = 4
BARS = {  # of a Fit
    "recall": ("recall of own top blocks", "#1d6fa5"),
    "recall_random": ("recall by chance", "#98a2b0"),
    "mass_selected": ("own mass on the selection", "#c2410c"),
    "mass_own_best": ("own mass on own best", "#1b2430"),
    "mass_random": ("own mass by chance", "#d9dee5"),
}


def as_figure(found: Inspection) -> "Figure":
    """The overlap matrix, the served layers, and a map for each full layer (mean of KV heads)."""
    from matplotlib.figure import Figure

    across = min(MAPS_ABREAST, len(found.full_layers))
    rows = -(-len(found.full_layers) // across)
    figure = Figure(figsize=(14, 5.5 + 3.6 * rows), layout="constrained")
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[5.5, 3.6 * rows])
    above, below = parts[:, 0]
    overlap, served = above.subplots(1, 2)
    _draw_overlap(overlap, found)
    _draw_served(served, found)
    maps = below.subplots(rows, across, squeeze=False).flat
    for axes in maps[len(found.full_layers) :]:
        axes.set_axis_off()
    for axes, full in zip(maps, found.full_layers, strict=False):
        _draw_map(axes, found, full)
    figure.suptitle(
        f"{found.checkpoint}: {found.spec.pattern}, {found.kind}, {found.tokens:,} tokens, top "
        f"{found.spec.top_k_blocks} blocks of {found.spec.block_size}",
        fontsize=11,
    )
    return figure


def _draw_overlap(axes: Any, found: Inspection) -> None:
    import numpy as np

    axes.set_title("overlap: blocks of row a for layer b", fontsize=10)
    if found.overlap is None:
        axes.text(0.5, 0.5, "every block is selected", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    values = np.array(found.overlap)
    values[np.tril_indices_from(values)] = np.nan
    image = axes.imshow(values, cmap=COLOURS, vmin=0, vmax=1, aspect="equal")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_xlabel("layer b")
    axes.set_ylabel("layer a")


def _draw_served(axes: Any, found: Inspection) -> None:
    fits = [(layer.layer, layer.fit) for layer in found.served_layers if layer.fit is not None]
    width = 0.8 / len(BARS)
    for i, (field, (label, colour)) in enumerate(BARS.items()):
        heights = [getattr(fit, field) for _, fit in fits]
        places = [place + (i - len(BARS) / 2 + 0.5) * width for place in range(len(fits))]
        axes.bar(places, heights, width, color=colour, label=label)
    axes.set_xticks(range(len(fits)), [str(layer) for layer, _ in fits])
    axes.set_ylim(0, 1.25)
    axes.set_title("served layers", fontsize=10)
    axes.set_xlabel("layer")
    axes.legend(fontsize=7, ncols=3)


def _draw_map(axes: Any, found: Inspection, full: FullLayer) -> None:
    import numpy as np

    cells = np.array([head.map for head in full.heads], np.float64).mean(0)
    extent = (0, found.tokens, found.tokens, 0)
    axes.imshow(cells, cmap=COLOURS, vmin=0, vmax=1, aspect="auto", extent=extent)
    axes.set_title(f"layer {full.layer} selects, for {_span(full.serves)}", fontsize=10)
    axes.set_xlabel("key")
    axes.set_ylabel("query")


def _span(layers: list[int]) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
