"""Tables on terminals of several widths: words and numbers stay whole, and nothing is lost."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from cachekd_cli.console import table

TYPES = ("question", "count", "teacher", "ce", "ce, blind", "switch-kd", "switch-kd, blind", "prior")
ROWS = [
    ("is there", "1,084", "98.8", "33.3", "27.4", "41.7", "41.6", "81.0"),
    ("what shape", "23", "100.0", "21.7", "17.4", "17.3", "0.0", "34.8"),
]
# What may not be broken, one below the other: words of the names and the first column, whole numbers.
TYPED = [
    ("question", "count", "teacher", "ce", "blind", "switch-kd", "switch-kd,", "prior"),
    ("shape", *ROWS[0][1:]),
    ("there", *ROWS[1][1:]),
]
WIDTHS = [40, 50, 66, 80, 200]


def drawn(found: object, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(found)
    return [line.rstrip() for line in capture.get().splitlines()]


def rows_of(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[:1] in "│┃"]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_word_and_no_number_is_broken(width):
    lines = drawn(table("exact match, %", TYPES, ROWS), width)
    assert max(map(len, lines)) <= width
    words = {word for row in rows_of(lines) for cell in row for word in cell.split()}
    assert words == {word for row in (TYPES, *ROWS) for cell in row for word in cell.split()}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_number_stands_once_beside_the_name_of_its_row(width):
    lines = drawn(table("exact match, %", TYPES, ROWS), width)
    for name, *numbers in ROWS:
        # A name may go on below its row where it is too long.
        mine = [row for row in rows_of(lines) if name.startswith(row[0]) and row[0] and row[1] in numbers]
        assert [cell for row in mine for cell in row[1:]] == numbers


def test_it_is_one_table_while_there_is_room():
    least = sum(max(map(len, column)) + 3 for column in zip(*TYPED, strict=True)) + 1
    for width, tables in ((least - 1, 2), (least, 1), (200, 1)):
        lines = drawn(table("t", TYPES, ROWS), width)
        assert sum(line.startswith("┏") for line in lines) == tables


def test_a_unit_stays_with_its_number_and_a_long_text_takes_several_lines():
    rows = [("size", "12.5 MB"), ("where", "a text of several words which is longer than its column is wide")]
    lines = drawn(table("cache", ("", "value"), rows), 40)
    assert max(map(len, lines)) <= 40
    cells = [row[1] for row in rows_of(lines)]
    assert cells[1] == "12.5 MB"
    assert " ".join(cells[2:]) == rows[1][1]
    assert len(cells) > 3


def test_a_path_that_is_longer_than_the_screen_is_there_to_its_end():
    path = "/data/" + "0123456789" * 12 + "/train.tar"
    lines = drawn(table("rows", ("", "found", "what to do"), [("data", path, "nothing")], texts=3), 60)
    assert max(map(len, lines)) <= 60
    assert "".join(row[1] for row in rows_of(lines)[1:]) == path
    assert rows_of(lines)[1][2] == "nothing"


def test_a_table_without_rows_has_its_head():
    assert rows_of(drawn(table("empty", ("shard", "KL"), []), 80)) == [["shard", "KL"]]
