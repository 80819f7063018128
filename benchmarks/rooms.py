"""The house from outside: its rooms, which of them imports which, and which files one command runs through.

    python benchmarks/rooms.py
    python benchmarks/rooms.py --trace dump --teacher T --data D --limit 1 --out /tmp/cache
    python benchmarks/rooms.py --within training_step --trace train --student S --teacher T ...

A room is a package right below `cachekd` with all that is in it, or a module beside the packages; the command
line is one more. An arrow is an import of one room by another, wherever it stands: at the top of a file, in a
function, or for types alone. The ground floor imports nothing; every other room stands one floor above the
highest room that it imports. Rooms that import each other, directly or through others, are a circle, and the
arrows between them run back. `cachekd/__init__.py` is left out: it names what all rooms offer.

`--trace` runs a command of cachekd here, and lists the files of ours whose functions ran, in the order in
which they were first entered. `--within` counts only while a function of that name runs.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
Graph = dict[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of ours, by its dotted name."""
    found = {}
    for package, above in (("cachekd", root), ("cachekd_cli", root / "cli")):
        for path in sorted((above / package).rglob("*.py")):
            parts = path.relative_to(above).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str | None:
    """Of a dotted name; None for `cachekd` itself."""
    top, *below = module.split(".")
    if top == "cachekd_cli":
        return "cli"
    return below[0] if below else None


def imports_of(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            inside = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in known else node.module for name in inside)


def arrows(known: dict[str, Path]) -> Graph:
    """Of each room, those that it imports."""
    found: Graph = {}
    for module, path in known.items():
        here = room_of(module)
        if here is not None:
            there = {room_of(name) for name in imports_of(path, known)}
            found.setdefault(here, set()).update(name for name in there if name not in (here, None))
    return found


def reached(graph: Graph, start: str) -> set[str]:
    """The rooms that a room imports, directly or through others."""
    found: set[str] = set()
    todo = [*graph[start]]
    while todo:
        room = todo.pop()
        if room not in found:
            found.add(room)
            todo += graph[room]
    return found


@dataclass(frozen=True)
class House:
    """What there is to say of the imports.

    Attributes:
        graph: of each room, those that it imports.
        floors: of each room, counted from 0; rooms of one circle share theirs.
        circles: sets of rooms that import each other.
        back: arrows within circles.
    """

    graph: Graph
    floors: dict[str, int]
    circles: list[list[str]]
    back: list[tuple[str, str]]

    @classmethod
    def of(cls, graph: Graph) -> House:
        """Look at a graph of rooms."""
        below = {room: reached(graph, room) for room in graph}
        circle = {room: {room} | {other for other in below[room] if room in below[other]} for room in graph}
        floors: dict[str, int] = {}

        def floor(room: str) -> int:
            if room not in floors:
                outside = {other for each in circle[room] for other in graph[each]} - circle[room]
                here = 1 + max(map(floor, outside), default=-1)
                floors.update(dict.fromkeys(circle[room], here))
            return floors[room]

        for room in graph:
            floor(room)
        circles = sorted({tuple(sorted(each)) for each in circle.values() if len(each) > 1})
        back = [(a, b) for a in sorted(graph) for b in sorted(graph[a]) if b in circle[a]]
        return cls(graph, floors, [list(each) for each in circles], back)


class Trace:
    """Which files of ours a program runs through.

    Attributes:
        files: in the order in which they were first entered.
        entered: how often the program went from one room into another.
        climbed: how often that was into a room on a higher floor than the one that it came from.
    """

    def __init__(self, known: dict[str, Path], house: House, within: str | None) -> None:
        self._rooms = {str(path): room_of(module) for module, path in known.items()}
        self._floors, self._within = house.floors, within
        self.files: dict[str, None] = {}
        self.entered = self.climbed = 0

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        """For `sys.setprofile`. Importing a file is not running through it."""
        here = self._rooms.get(frame.f_code.co_filename)
        if event != "call" or here is None or frame.f_code.co_name == "<module>" or not self._counts(frame):
            return
        self.files.setdefault(frame.f_code.co_filename)
        before = self._room_below(frame)
        if before not in (None, here):
            self.entered += 1
            self.climbed += self._floors[here] > self._floors[str(before)]

    def _counts(self, frame: FrameType | None) -> bool:
        while self._within is not None and frame is not None:
            if frame.f_code.co_name == self._within:
                return True
            frame = frame.f_back
        return self._within is None

    def _room_below(self, frame: FrameType) -> str | None:
        """The room of the function of ours that called, directly or through others."""
        caller = frame.f_back
        while caller is not None and self._rooms.get(caller.f_code.co_filename) is None:
            caller = caller.f_back
        return None if caller is None else self._rooms[caller.f_code.co_filename]


def trace(command: list[str], known: dict[str, Path], house: House, within: str | None) -> Trace:
    """Run a command of cachekd, and note where it goes."""
    from cachekd_cli.main import app

    noted = Trace(known, house, within)
    threading.setprofile(noted)
    sys.setprofile(noted)
    try:
        app(command, standalone_mode=False)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return noted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to look at")
    parser.add_argument("--within", help="a function's name")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trace", nargs=argparse.REMAINDER, metavar="COMMAND", help="must come last")
    options = parser.parse_args()
    known = modules(options.root.resolve())
    house = House.of(arrows(known))
    result: dict[str, Any] = {
        "files": len(known),
        "lines": sum(len(path.read_text().splitlines()) for path in known.values()),
        "rooms": len(house.graph),
        "floors": 1 + max(house.floors.values()),
        "arrows": sum(map(len, house.graph.values())),
        "back": [f"{a} -> {b}" for a, b in house.back],
        "circles": house.circles,
    }
    if options.trace:
        noted = trace(options.trace, known, house, options.within)
        files = [str(Path(file).relative_to(options.root.resolve())) for file in noted.files]
        result = {"entered": noted.entered, "climbed": noted.climbed, "count": len(files), "files": files}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    console = Console()
    if not options.trace:
        table = Table("floor", "room", "imports", title="rooms of cachekd")
        for room in sorted(house.graph, key=lambda name: (-house.floors[name], name)):
            table.add_row(str(house.floors[room]), room, ", ".join(sorted(house.graph[room])))
        console.print(table)
    for name, value in result.items():
        if isinstance(value, list):
            value = "none" if not value else "\n  ".join(["", *map(str, value)])
        console.print(f"{name}: {value}", highlight=False)


if __name__ == "__main__":
    main()
