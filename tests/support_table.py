"""The support table of docs/reference/families.md: each test writes, or checks, its own cell.

`CACHEKD_WRITE_TABLE=1 python -m pytest tests/models/test_families.py` writes it; without that a test fails
whose cell says something else than what it found. The table is of the transformers in constraints.txt: with
another version nothing is compared.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "reference" / "families.md"
BEGIN, END = "<!-- table: tests/models/test_families.py -->\n", "<!-- end of table -->\n"
CORNER = "model_type"


def read() -> dict[tuple[str, str], str]:
    """(family, feature) -> what the docs say."""
    lines = PATH.read_text().split(BEGIN)[1].split(END)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    features = rows[0][1:]
    return {
        (row[0].strip("`"), feature): cell
        for row in rows[2:]
        for feature, cell in zip(features, row[1:], strict=True)
    }


def write(cells: dict[tuple[str, str], str], families: list[str], features: list[str]) -> None:
    rows = [[CORNER, *features], ["---"] * (1 + len(features))]
    rows += [
        [f"`{family}`", *(cells.get((family, feature), "") for feature in features)] for family in families
    ]
    table = "".join("| " + " | ".join(row) + " |\n" for row in rows)
    before, rest = PATH.read_text().split(BEGIN)
    PATH.write_text(before + BEGIN + table + END + rest.split(END)[1])


def cell(family: str, feature: str, found: str, families: list[str], features: list[str]) -> None:
    """Say what a test found."""
    cells = read()
    if os.environ.get("CACHEKD_WRITE_TABLE"):
        write({**cells, (family, feature): found}, families, features)
    elif f"transformers=={version('transformers')}" in (ROOT / "constraints.txt").read_text().splitlines():
        said = cells.get((family, feature))
        assert said == found, (
            f"docs/reference/families.md says {said!r}, found {found!r}: CACHEKD_WRITE_TABLE=1 pytest"
        )
