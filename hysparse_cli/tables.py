"""Draws tables that lose nothing in a narrow terminal."""

from collections.abc import Iterator
from typing import Any

from rich import table as rich_table
from rich.cells import cell_len
from rich.measure import Measurement
from rich.text import Text

_ANY_WIDTH = 10_000


class Table(rich_table.Table):
    """A rich table; where the terminal is too narrow for its figures, a paragraph for each row."""

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        for column in self.columns:
            if column.no_wrap:  # rich measures the longest word, and would cut the others
                lines = "\n".join(map(str, (column.header, *column.cells))).split("\n")
                column.min_width = max(map(cell_len, lines))
        anywhere = options.update_width(_ANY_WIDTH)
        if Measurement.get(console, anywhere, self).minimum <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text(str(self.title), style=self.title_style or "bold")
        for row in self._paragraphs(options.max_width):
            yield Text(row, overflow="fold")
        if self.caption:
            yield Text(str(self.caption), style="italic")

    def _paragraphs(self, width: int) -> Iterator[str]:
        """``header cell; header cell``, wrapped between cells, or between words of a long one."""
        headers = [" ".join(str(column.header).split()) for column in self.columns]
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            words = [" ".join(str(cell).split()) for cell in cells]
            said = [f"{h} {word}".strip() for h, word in zip(headers, words, strict=True) if word]
            lines = [""]
            for i, part in enumerate(said):
                part += ";" if i < len(said) - 1 else ""
                if lines[-1].strip() and cell_len(f"{lines[-1]} {part}") > width:
                    lines.append("  ")
                for word in part.split():
                    if lines[-1].strip() and cell_len(f"{lines[-1]} {word}") > width:
                        lines.append("  ")
                    lines[-1] += word if not lines[-1].strip() else f" {word}"
            yield "\n".join(lines)
