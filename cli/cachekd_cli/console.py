"""What the commands share: the console, progress bars, tables, and quiet libraries."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from cachekd.errors import CachekdError
from cachekd_cli.tables import CellColumn, WholeWords

if TYPE_CHECKING:
    from cachekd.data.left_out import LeftOutSamples


SHOWN = 5  # of the samples that a table is about
Result = TypeVar("Result")

console = Console(emoji=False)  # what is between two colons of a key or a path is no picture
errors = Console(stderr=True, emoji=False)


def print_error(error: CachekdError) -> None:
    """Print the problem after a red word, and the details under it."""
    say_wrong("error:", str(error))


def say(text: str | Text, to: Console = console, style: str | None = None) -> None:
    """Print a text as it is: nothing in it is markup or a command to the terminal, and lines end where it has
    them."""
    text = printable(text) if isinstance(text, str) else text
    to.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def say_wrong(what: str, text: str) -> None:
    """Print on stderr what is wrong, in red, and how."""
    say(Text.assemble((printable(what), "bold red"), f" {printable(text)}"), errors)


def print_result(
    as_json: bool,
    result: Result,
    print_words: Callable[[Result], object],
    for_scripts: Callable[[Result], Any] = lambda result: result,
) -> None:
    """Print what a command has found: in words, or as JSON that is alone on stdout.

    Args:
        for_scripts: makes models, dataclasses and what JSON knows of it, where it is not itself all of these.
    """
    if as_json:
        print(_json(for_scripts(result)))
    else:
        print_words(result)


def print_json_list(values: Iterable[Any]) -> None:
    """Print a list as JSON, without having all of it in memory."""
    separator = "["
    for value in values:
        print(separator + indent(f"\n{_json(value)}", "  "), end="")
        separator = ","
    print("[]" if separator == "[" else "\n]")


def _json(value: Any) -> str:
    return json.dumps(to_jsonable_python(value, fallback=str), indent=2)


class RateColumn(ProgressColumn):
    """Units per second: those of a task's field `units`, or else its steps."""

    def __init__(self, unit: str, table_column: Column | None = None) -> None:
        super().__init__(table_column)
        self.unit = unit

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        done = task.fields.get("units", task.completed)
        rate = done / elapsed if elapsed else 0.0
        return Text(f"{rate:,.0f} {self.unit}/s", style="progress.data.speed")


def progress_bar(unit: str, *, hidden: bool = False) -> Progress:
    """A bar with count, rate in `unit` and ETA, on stderr, so that `--json` stays clean. On a narrow terminal
    a long description takes several lines, and the numbers stay whole."""
    whole = Column(no_wrap=True)
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        BarColumn(bar_width=20),
        MofNCompleteColumn(table_column=whole.copy()),
        RateColumn(unit, table_column=whole.copy()),
        TextColumn("eta", table_column=whole.copy()),
        TimeRemainingColumn(table_column=whole.copy()),
        TextColumn("{task.fields[note]}", markup=False),
        console=errors,
        disable=hidden,
    )


@contextmanager
def counting_samples(
    description: str, total: int, *, hidden: bool = False
) -> Iterator[Callable[[int], None]]:
    """A bar that counts samples; yields what advances it by so many."""
    with progress_bar("samples", hidden=hidden) as bar:
        yield partial(bar.advance, bar.add_task(description, total=total, note=""))


@contextmanager
def counting_bytes(
    description: str, total: int | None = None, *, hidden: bool = False
) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar that counts bytes, with a rate in MB; yields what advances it, and what sets its total."""
    with progress_bar("MB", hidden=hidden) as bar:
        task = bar.add_task(description, total=total, units=0, note="")

        def advance(size: int) -> None:
            bar.update(task, advance=size, units=(bar.tasks[task].completed + size) / 1e6)

        def set_total(size: int) -> None:
            bar.update(task, total=size)

        yield advance, set_total


def sample_progress(bar: Progress, description: str, total: int | None) -> Callable[[int, float], None]:
    """Add a task that counts samples, with a rate in units; return what advances it by (samples, units)."""
    task = bar.add_task(description, total=total, units=0, note="")

    def advance(samples: int, units: float) -> None:
        bar.update(task, advance=samples, units=bar.tasks[task].fields["units"] + units)

    return advance


def duration(seconds: float) -> str:
    """Write seconds in the unit that says most: seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 3600 else f"{seconds / 3600:,.2f} h"


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], texts: int = 1) -> WholeWords:
    """A table whose first columns, so many, are texts, and whose others are numbers. On a narrow terminal a
    long cell takes several lines: names that begin alike cannot be told apart without their ends."""
    cells = [[cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row] for row in rows]
    made = [
        CellColumn(name, [row[index] for row in cells], index < texts) for index, name in enumerate(columns)
    ]
    return WholeWords(title, made)


def print_values(title: str, values: Mapping[str, Any]) -> None:
    """Print names with their values, one a line; those that are None are left out."""
    console.print(table(title, ("", "value"), ((n, v) for n, v in values.items() if v is not None)))


def if_any(count: float | None, text: str = "{:,}") -> str | None:
    """Write a count that is of interest where it is not 0; None where it is, or is unknown."""
    return text.format(count) if count else None


def print_left_out(what: str, left_out: LeftOutSamples, done: str = "left out") -> None:
    """Print how many samples were left out, and some of them with the reason; nothing where none was.

    Args:
        done: or what else was done with them.
    """
    if not left_out.samples:
        return
    lines = [f"{done}: {left_out.samples:,} {what}"]
    lines += [f"  {key}: {reason}" for key, reason in islice(left_out.first.items(), SHOWN)]
    say("\n".join(lines))


def write_page(path: Path, html: str) -> None:
    """Write an HTML page, and say on stderr where it is.

    Raises:
        CachekdError: it cannot be written.
    """
    from cachekd.atomic import write_file

    write_file(path, html.encode())
    say(f"page: {path.resolve()}", errors)


def quiet_libraries() -> None:
    """Leave the terminal to our own bars and messages."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # It speaks at its import, and of each product with 8-bit weights.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_hub() -> None:
    """Quiet huggingface_hub too, whose bars would draw into ours."""
    from huggingface_hub import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    hub_logging.set_verbosity_error()
    disable_progress_bars()


_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def visible(text: str) -> str:
    """Replace every character that would not show, or would do something, by a sign or its escape.

    A key or a token may hold escape sequences that clear the screen, or marks that turn the reading order.
    """
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else _escaped(c)) for c in text)


def printable(text: str) -> str:
    """The same for a text of several lines, which stay lines."""
    return "\n".join(map(visible, text.split("\n")))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
