"""The rooms of the house: none imports what stands above it, and CONTRIBUTING names them all."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = {"models", "check", "dump", "train", "evaluate", "report", "hub", "export", "pipeline"}
ABOVE |= {"compare", "cli"}


@pytest.fixture(scope="module")
def rooms():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import rooms

        return rooms


@pytest.fixture(scope="module")
def house(rooms):
    return rooms.House.of(rooms.arrows(rooms.modules()))


def test_a_house_of_known_shape(rooms):
    graph = {"cli": {"train", "data"}, "train": {"report"}, "report": {"train", "data"}, "data": set()}
    house = rooms.House.of(graph)
    assert house.floors == {"data": 0, "train": 1, "report": 1, "cli": 2}
    assert house.circles == [["report", "train"]]
    assert house.back == [("report", "train"), ("train", "report")]


def test_imports_are_found_wherever_they_stand(rooms, tmp_path):
    package = tmp_path / "cachekd"
    for name, text in {
        "__init__": "from cachekd.top import anything",
        "top": "def later():\n    from cachekd.low import deep\n    import cachekd.side",
        "side": "if TYPE_CHECKING:\n    from cachekd.low.deep import Name",
        "low/__init__": "",
        "low/deep": "import json",
    }.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    known = rooms.modules(tmp_path)
    assert rooms.arrows(known) == {"top": {"low", "side"}, "side": {"low"}, "low": set()}


def test_no_import_runs_back_up(house):
    assert house.circles == []


def test_the_format_and_the_losses_stand_below_the_models(rooms, house):
    for room in ("cache", "losses", "config", "vocabulary"):
        assert not rooms.reached(house.graph, room) & ABOVE, room
    for room in ("cache", "losses"):
        for path in (ROOT / "cachekd" / room).rglob("*.py"):
            assert not re.search(r"^\s*(from|import) transformers", path.read_text(), re.M), path
    for path in (ROOT / "cachekd" / "vocabulary").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (transformers|torch)", path.read_text(), re.M), path


def test_contributing_has_a_row_for_every_room(house):
    rows = re.findall(r"^\| `(?:cachekd/)?(\w+)(?:\.py)?`", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert sorted(rows) == sorted(house.graph)


def test_a_trace_lists_the_files_that_a_command_runs_through(rooms, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rooms.py", "--json", "--trace", "schema", "manifest"])
    rooms.main()
    shown = capsys.readouterr().out
    assert "cachekd/schemas.py" in shown
    assert "cachekd/train/trainer.py" not in shown
