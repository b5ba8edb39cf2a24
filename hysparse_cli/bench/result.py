"""Holds what ``hysparse bench`` found, as JSON, CSV, Markdown and a table in the terminal."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hysparse_cli.bench.exactness import WRONG
from hysparse_cli.bench.plots import plots_of
from hysparse_cli.bench.rows import Row, times_dense
from hysparse_cli.bench.table import COLUMNS, caption, cells_of_row
from hysparse_cli.files.output import whole_file, write_whole
from hysparse_cli.model.loading import short_names
from hysparse_cli.recipe import BenchOptions

if TYPE_CHECKING:
    from rich.console import Group

    from hysparse_cli.tables import Table

SCHEMA = "hysparse.bench/2"
RESULT, RECIPE = "bench.json", "recipe.yaml"
WRITTEN_AFTER = ("bench.csv", "bench.md", RECIPE, "memory.png", "*-batch-*.png")


@dataclass(frozen=True)
class Bench:
    """All rows, and what they must be read with.

    model: the checkpoint or config. environment: of environment.py, with the clocks before
        and after.
    ceilings: ceilings.py's. subjects: what each is, in the order of the rows.
    """

    model: str
    options: BenchOptions
    environment: dict[str, Any]
    ceilings: dict[str, float]
    subjects: list[dict[str, Any]]
    rows: list[Row]

    def phases(self) -> list[str]:
        return list(dict.fromkeys(row.phase for row in self.rows))

    def failures(self) -> list[str]:
        """Rows whose attention was wrong, which no time is given for."""
        return [
            f"{row.subject}, {row.phase} at {row.context:,} x {row.batch:,}: {row.error}"
            for row in self.rows
            if row.error is not None and row.error.startswith(WRONG)
        ]

    def times_dense(self, row: Row) -> dict[str, float]:
        return times_dense(row, self.rows)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "options": self.options.model_dump(mode="json"),
            "environment": self.environment,
            "ceilings": self.ceilings,
            "subjects": self.subjects,
            "rows": [row.as_json(self.ceilings, self.times_dense(row)) for row in self.rows],
        }

    def as_csv(self) -> str:
        """A line a row; samples are left to the JSON."""
        rows = [
            {name: value for name, value in row.items() if not isinstance(value, list)}
            for row in self.as_json()["rows"]
        ]
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def markdown(self) -> str:
        lines = [f"{self._title()}.", ""]
        for phase in self.phases():
            names = COLUMNS[phase]
            lines += [f"**{phase}**", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
            lines += [f"| {' | '.join(cells)} |" for _, cells in self._cells(phase)]
            lines.append("")
        return "\n".join([*lines, *(f"- {note}" for note in caption(self))]) + "\n"

    def write(self, folder: Path) -> None:
        """bench.json, bench.csv, bench.md and the plots, into a folder that is there."""
        write_whole(folder / RESULT, json.dumps(self.as_json(), indent=1) + "\n")
        write_whole(folder / "bench.csv", self.as_csv())
        write_whole(folder / "bench.md", self.markdown())
        for plot in plots_of(self.as_json()):
            with whole_file(folder / f"{plot.name}.png") as partial:
                plot.figure().savefig(partial, format="png")

    def table(self) -> "Group":
        """A table a phase, and what they mean below."""
        from rich.console import Group
        from rich.text import Text

        tables = [self._table(phase) for phase in self.phases()]
        return Group(Text(self._title()), *tables, Text("\n".join(caption(self)), style="italic"))

    def _table(self, phase: str) -> "Table":
        from rich import box

        from hysparse_cli.tables import Table

        table = Table(
            title=phase,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        rows = self._cells(phase)
        shown = [i for i in range(len(COLUMNS[phase])) if any(cells[i] for _, cells in rows)]
        for name in (COLUMNS[phase][i] for i in shown):
            is_subject = name == "subject"
            table.add_column(name, justify="left" if is_subject else "right", no_wrap=is_subject)
        before = None
        for row, cells in rows:
            if before is not None and before != row.cell:
                table.add_section()
            cells[0] = "" if before == row.cell else cells[0]
            table.add_row(*(cells[i] for i in shown))
            before = row.cell
        return table

    def _cells(self, phase: str) -> list[tuple[Row, list[str]]]:
        chosen = [row for row in self.rows if row.phase == phase]
        return [(row, cells_of_row(row, self.ceilings, self.times_dense(row))) for row in chosen]

    def _title(self) -> str:
        env = self.environment
        device = f"{env['device']} ({env['device_name']})"
        (name,) = short_names([self.model])
        return f"{name} on {device}, torch {env['torch']}"
