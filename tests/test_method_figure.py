"""docs/method.svg is what docs/method_figure.py draws."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from caches import ROOT


def drawn_in(path: Path) -> tuple[list[str], list[str]]:
    """Its words in their order, and its boxes and lines: no version of matplotlib draws others."""
    text = path.read_text()
    return re.findall(r"<!-- (.+?) -->", text), re.findall(r'<g id="((?:patch|line2d)_\d+)"', text)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("figure") / "method.svg"
    subprocess.run([sys.executable, str(ROOT / "docs" / "method_figure.py"), str(path)], check=True)
    return path


def test_the_script_draws_the_figure_of_the_pages(drawn):
    words, shapes = drawn_in(drawn)
    assert len(words) > 30
    assert len(shapes) > 30
    assert drawn_in(ROOT / "docs" / "method.svg") == (words, shapes)


def test_it_has_every_part_and_every_term(drawn):
    words = " ".join(drawn_in(drawn)[0])
    for symbol in ("V_T", "P_T", "L_T", "V_S", "P_S", "L_S", "z_T", "z_S", "z_W", "{CE}", "{Align}", "{VSD}"):
        assert symbol in words, symbol
