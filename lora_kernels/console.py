"""Output on stdout: tables that lose no text in a file, in a pipe or on a narrow terminal."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement, measure_renderables
from rich.table import Column, Table

__all__ = ["DASH", "SplitTable", "on_stdout"]

# The cell of a value that does not exist.
DASH = "-"

# Columns. A table takes as many as it needs.
_UNBOUNDED = 10_000


def on_stdout() -> Console:
    """Return a console as wide as the terminal or the notebook, or without either as wide as the printed text."""
    console = Console(highlight=False)
    return console if console.is_terminal or console.is_jupyter else _Piped(highlight=False, width=_UNBOUNDED)


class _Piped(Console):
    """A console that strips the trailing blanks of lines, which pad the last cells."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `Console.print` does, without trailing blanks."""
        with self.capture() as printed:
            super().print(*objects, **options)
        print(re.sub(r" +(?=\n)", "", printed.get()), end="", file=self.file, flush=True)


class SplitTable(Table):
    """A table that splits on a narrow screen into several tables below one another, each with the names of the rows.

    In a split table, headings that may wrap do so between words, and numbers stay whole.

    Args:
        *columns: As in `rich.table.Table`.
        names: Number of leading columns that name a row.
        **look: As in `rich.table.Table`; overrides the look that tables have here.
    """

    def __init__(self, *columns: Column | str, names: int = 1, **look: Any) -> None:
        usual: dict[str, Any] = dict(
            box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0)
        )
        self._look = usual | look
        super().__init__(*columns, **self._look)
        self._names = names

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the whole table, or one part after another."""
        unbounded = options.update(width=_UNBOUNDED)
        if Measurement.get(console, unbounded, self).maximum <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        for i, part in enumerate(self._parts(console, unbounded, options.max_width)):
            # Separate the parts by a blank line, unless the edge is one.
            if i and not self.show_edge:
                yield ""
            yield part

    def _parts(self, console: Console, unbounded: ConsoleOptions, width: int) -> Iterator[Table]:
        def fits(columns: list[Column]) -> bool:
            return Measurement.get(console, unbounded, self._part(columns)).maximum <= width

        columns = [_narrow_column(console, unbounded, column) for column in self.columns]
        names, begins = columns[: self._names], True
        shown = names
        for column in [*columns[self._names :], None]:
            if shown is not names and (column is None or not fits([*shown, column])):
                # If even one column does not fit, let the names wrap.
                if not fits(shown):
                    shown = [replace(name, width=None) for name in names] + shown[self._names :]
                part = self._part(shown, None if begins else "")
                for row, *cells in zip(self.rows, *(column.cells for column in shown), strict=True):
                    part.add_row(*cells, style=row.style, end_section=row.end_section)
                yield part
                shown, begins = names, False
            if column is not None:
                shown = [*shown, column]

    def _part(self, columns: list[Column], title: str | None = None) -> Table:
        """Return a table of the given columns, without rows; the title is this table's own if None."""
        look = self._look | {"padding": 0, "title": self.title if title is None else title}
        return Table(*(column.copy() for column in columns), **look)


def _narrow_column(console: Console, unbounded: ConsoleOptions, column: Column) -> Column:
    """Return a column as narrow as its cells allow."""
    size = measure_renderables(console, unbounded, [column.header, *column.cells])
    return replace(column, width=size.maximum if column.no_wrap else size.minimum, no_wrap=False, overflow="fold")
