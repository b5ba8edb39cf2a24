"""Draws the tables of ``hysparse convert``: the plan, what was measured, and what was written."""

from rich.console import Group
from rich.text import Text

from hysparse_cli.convert.decide import Measured
from hysparse_cli.convert.ledger import Ledger
from hysparse_cli.convert.plan import Plan
from hysparse_cli.convert.write import Conversion
from hysparse_cli.printable import printable
from hysparse_cli.start.result import Start
from hysparse_cli.tables import Table
from hysparse_cli.units import format_bytes, format_tokens


def plan_table(plan: Plan) -> Table:
    """A row a layer, and the KV cache in total against the dense model's."""
    chosen = (plan.fit, plan.selection, plan.swaps)
    table = Table(
        title=f"{printable(plan.dense.source.name)}: {plan.spec.layout}, {plan.spec.pattern}",
        title_justify="left",
        title_style="bold",
        caption="\n".join(part.line() for part in chosen if part),
        caption_justify="left",
    )
    table.add_column("layer", justify="right")
    table.add_column("role")
    table.add_column("new tensors")
    for context in plan.contexts:
        table.add_column(f"KV {format_tokens(context)}", justify="right", no_wrap=True)
    for layer, new in enumerate(plan.new_by_layer):
        kv = [format_bytes(plan.kv.layer_bytes(layer, c, plan.itemsize)) for c in plan.contexts]
        kinds = dict.fromkeys(map(_kind, new))
        table.add_row(str(layer), _role(plan, layer), ", ".join(kinds) or "—", *kv)
    table.add_section()
    totals, dense = plan.total_kv_bytes(plan.kv), plan.total_kv_bytes(plan.dense.kv)
    tensors = f"{len(plan.new_tensors)} tensors"
    table.add_row("", "all layers", tensors, *map(format_bytes, totals))
    table.add_row("", "dense model", "", *map(format_bytes, dense))
    ratios = [f"{d / t:.2f}x" for t, d in zip(totals, dense, strict=True)]
    table.add_row("", "smaller by", "", *ratios, style="bold")
    return table


def measured_table(measured: Measured) -> Group:
    """The measured start and the damage ledger, whichever there is."""
    start, ledger = measured.start, measured.ledger
    return Group(
        *([start_table(start)] if start else []), *([ledger_table(ledger)] if ledger else [])
    )


def start_table(start: Start) -> Table:
    """A row a sparse layer: how well it fits the dense one, measured where it starts."""
    caption = "squared error of the attention output, relative to the dense layer's"
    table = Table(title="start", title_justify="left", title_style="bold", caption=caption)
    columns = ("gates 1/2", "copied", "best", "fitted", "worst head", "mean gates")
    for name in ("layer", *columns):
        table.add_column(name, justify="right")
    for layer, fit in start.fits.items():
        errors = (fit.half, fit.copied, fit.best, fit.fitted, max(fit.by_head))
        gates = f"{fit.gates[0]:.2f} {fit.gates[1]:.2f}"
        table.add_row(str(layer), *(f"{error:.4f}" for error in errors), gates)
    return table


def ledger_table(ledger: Ledger) -> Group:
    """Each step's change of the loss, in all layers and in each alone, for both losses."""
    tables = [_losses(ledger, 0, f"all {ledger.tokens:,} tokens")]
    if ledger.answer_tokens:
        tables.append(_losses(ledger, 1, f"{ledger.answer_tokens:,} tokens of planted answers"))
    return Group(*tables)


def conversion_table(conversion: Conversion) -> Text:
    """What was written, in a line."""
    written = f"{format_bytes(sum(conversion.files.values()))} in {len(conversion.files)} shards"
    return Text(f"{conversion.out}: {written}, {conversion.seconds:.1f} s")


def _losses(ledger: Ledger, kind: int, tokens: str) -> Table:
    title = f"damage: loss of {tokens}, dense {ledger.dense[kind]:.4f} nats"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("layers", *ledger.steps, "in all"):
        table.add_column(name, justify="right")
    rows = {"all": ledger.total} | {str(layer): steps for layer, steps in ledger.by_layer.items()}
    for name, losses in rows.items():
        changes = [*ledger.changes(losses), losses[-1].minus(ledger.dense)]
        table.add_row(name, *(f"{change[kind]:+.4f}" for change in changes))
        if name == "all":
            table.add_section()
    return table


def _role(plan: Plan, layer: int) -> str:
    """What ``layer`` does and who serves whom, in words."""
    layers, shares = plan.spec.layers, plan.spec.selects
    if layer in layers.full_layers:
        served = layers.served_by(layer)
        return f"full, serves {_span(served)}" if served and shares else "full"
    return f"sparse, from {layers.server_of(layer)}" if shares else "sliding window"


def _kind(name: str) -> str:
    """``gate`` for ``model.layers.1.self_attn.hysparse.gate.weight``."""
    return name.partition(".hysparse.")[2].partition(".")[0]


def _span(layers: tuple[int, ...]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
