"""Tables for the terminal, in which words stay whole as long as there is room for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

BORDERS, EDGE = 3, 1  # of each column, and once
NUMBER = 20  # characters: what is not longer in a column of numbers stays on one line
NAME = 24  # characters: a longer word in a column of texts is broken before a table is cut in two


@dataclass(frozen=True)
class CellColumn:
    """A column.

    Attributes:
        name: its head.
        cells: without it.
        is_text: else it has numbers.
    """

    name: str
    cells: Sequence[Text]
    is_text: bool

    @property
    def most(self) -> int:
        """Characters that all of it takes without a line break of ours."""
        return max(cell_len(line) for text in self._texts for line in text.split("\n"))

    @property
    def least(self) -> int:
        """Characters below which a word or a number breaks."""
        pieces = [word for text in self._texts for word in text.split()]
        if not self.is_text:
            pieces += [cell.plain for cell in self.cells if cell.cell_len <= NUMBER]
        return max(map(cell_len, pieces), default=1)

    @property
    def _texts(self) -> list[str]:
        return [self.name, *(cell.plain for cell in self.cells)]


@dataclass(frozen=True)
class WholeWords:
    """A table, for `rich.console.Console.print`. Where the terminal is too narrow for it, its last columns
    stand in a table of their own below, beside the first ones again.

    Attributes:
        title: above it.
        columns: the first ones are texts, at least one.
    """

    title: str
    columns: Sequence[CellColumn]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        title: str | None = self.title
        for widths in self._tables(options.max_width):
            table = Table(title=None if title is None else Text(title, "table.title"), title_justify="left")
            for index, width in widths.items():
                column = self.columns[index]
                side = "left" if column.is_text else "right"
                table.add_column(Text(column.name), justify=side, width=width, overflow="fold")  # type: ignore[arg-type]
            for row in zip(*(self.columns[index].cells for index in widths), strict=True):
                table.add_row(*row)
            yield table
            title = None

    def _tables(self, width: int) -> list[dict[int, int]]:
        """Of each table, the places of its columns and their widths."""
        least = [column.least for column in self.columns]
        if not _fits(least, width):
            least = [min(one, NAME) if c.is_text else one for one, c in zip(least, self.columns, strict=True)]
        names = [index for index, column in enumerate(self.columns) if column.is_text]
        groups = [[*names]]
        for index in range(len(names), len(self.columns)):
            if len(groups[-1]) > len(names) and not _fits([least[i] for i in (*groups[-1], index)], width):
                groups.append([*names])
            groups[-1].append(index)
        return [self._widths({index: least[index] for index in group}, width) for group in groups]

    def _widths(self, least: dict[int, int], width: int) -> dict[int, int]:
        """What is left of the width goes first to columns that need least to have all lines whole; what is
        missing is taken from the widest."""
        widths, spare = dict(least), width - _taken(least.values())
        for index in sorted(widths, key=lambda index: self.columns[index].most - widths[index]):
            more = min(max(0, spare), self.columns[index].most - widths[index])
            widths[index] += more
            spare -= more
        while spare < 0 and max(widths.values()) > 1:
            widths[max(widths, key=widths.__getitem__)] -= 1
            spare += 1
        return widths


def _fits(widths: Iterable[int], width: int) -> bool:
    return _taken(widths) <= width


def _taken(widths: Iterable[int]) -> int:
    return EDGE + sum(one + BORDERS for one in widths)
