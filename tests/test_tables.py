"""Tables of rich that cut nothing: each column is as wide as its words, or a row is a paragraph."""

from io import StringIO

from rich.console import Console

from hysparse_cli.tables import Table


def shown(table: Table, width: int) -> list[str]:
    console = Console(width=width, file=StringIO())
    console.print(table)
    assert isinstance(console.file, StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def two_columns() -> Table:
    table = Table(box=None, padding=0)
    for name in ("likeliest next", "all:\nrecall"):
        table.add_column(name, no_wrap=True)
    table.add_row("' of the' 12%", "34%")
    return table


def test_cells_of_several_words_are_never_cut() -> None:
    narrowest = len("likeliest next") + len("recall")
    assert shown(two_columns(), narrowest)[-1] == "' of the' 12% 34%"
    too_narrow = shown(two_columns(), narrowest - 1)
    assert too_narrow == ["likeliest next ' of", "  the' 12%;", "  all: recall 34%"]


def test_a_long_cell_folds_under_its_row() -> None:
    table = Table()
    table.add_column("layer", no_wrap=True)
    table.add_column("why", no_wrap=True)
    table.add_row("0", "full attention reads all of the keys")
    assert shown(table, 20) == ["layer 0;", "  why full attention", "  reads all of the", "  keys"]
