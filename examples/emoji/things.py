"""Things, who drew them, and what is asked of a drawing."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from packages import FOLDER, VENDORS, fetch, read_package  # isort: skip

NAME, GROUP = "what is this?", "which group does it belong to?"
# What may be asked of a drawing, by its category and subcategory in emoji.json.
KINDS: dict[str, Callable[[str, str], bool]] = {
    "an animal": lambda _, sort: sort.startswith("animal-"),
    "a plant": lambda _, sort: sort.startswith("plant-"),
    "a food": lambda _, sort: sort.startswith("food-"),
    "a face": lambda _, sort: sort.startswith("face-") or sort.endswith("-face"),
    "a person": lambda _, sort: sort.startswith("person") or sort == "family",
    "a building": lambda _, sort: sort in ("place-building", "place-religious"),
    "about transport": lambda _, sort: sort.startswith("transport-") and sort != "transport-sign",
    "a flag": lambda group, _: group == "Flags",
    "a symbol": lambda group, _: group == "Symbols",
}


@dataclass(frozen=True)
class Thing:
    """What several vendors drew.

    Attributes:
        code: its code points, such as `1f34e`, by which all vendors name their files.
        name, group: in lower case.
        sort: of the group's, such as `food-fruit`.
        kinds: those of KINDS that it is.
    """

    code: str
    name: str
    group: str
    sort: str
    kinds: frozenset[str]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Thing:
        """From an entry of emoji.json."""
        group, sort = entry["category"], entry["subcategory"]
        kinds = frozenset(kind for kind, holds in KINDS.items() if holds(group, sort))
        return cls(Path(entry["image"]).stem, entry["name"].lower(), group.lower(), sort, kinds)

    @property
    def unseen(self) -> bool:
        """Whether nobody's drawing of it is trained on: one thing in ten, whatever else is there."""
        return hashlib.sha256(self.code.encode()).digest()[0] % 10 == 0


@dataclass(frozen=True)
class Picture:
    """A vendor's drawing of a thing, as PNG."""

    vendor: str
    thing: Thing
    png: bytes

    @property
    def key(self) -> str:
        return f"{self.vendor}-{self.thing.code}"


def read_pictures(vendors: Iterable[str], folder: Path = FOLDER) -> list[Picture]:
    """All drawings that can be asked about, by vendor and code. See `usable`."""
    packages = {vendor: read_package(fetch(VENDORS[vendor], folder), vendor) for vendor in vendors}
    drawn = {vendor: pictures for vendor, (_, pictures) in packages.items()}
    entries = next(entries for entries, _ in packages.values())
    things = usable([Thing.of(entry) for entry in entries], drawn)
    return [
        Picture(vendor, thing, drawn[vendor][f"{thing.code}.png"]) for vendor in drawn for thing in things
    ]


def usable(things: list[Thing], drawn: dict[str, dict[str, bytes]]) -> list[Thing]:
    """The things whose name can be seen, by code.

    Left out are patches of skin colour (`component`), what one of the vendors did not draw, and things that
    share a name, or a vendor's very picture ("runner" and "man running"). Skin-tone variants have no entry of
    their own.
    """
    things = [
        thing
        for thing in things
        if thing.group != "component" and all(f"{thing.code}.png" in pictures for pictures in drawn.values())
    ]
    same: dict[tuple[str, str | bytes], set[str]] = {}
    for thing in things:
        same.setdefault(("name", thing.name), set()).add(thing.code)
        for vendor, pictures in drawn.items():
            look = Image.open(io.BytesIO(pictures[f"{thing.code}.png"])).convert("RGBA").tobytes()
            same.setdefault((vendor, look), set()).add(thing.code)
    twins = {code for codes in same.values() if len(codes) > 1 for code in codes}
    return sorted((thing for thing in things if thing.code not in twins), key=lambda thing: thing.code)


def ask(pictures: list[Picture], seed: str, *, names: bool = True) -> list[list[tuple[str, str]]]:
    """The (question, answer) pairs of every picture, in random order.

    Of each kind that is asked about, as many pictures are as are not: its question alone tells nothing.

    Args:
        seed: what is drawn is drawn by it.
        names: whether names are asked.
    """
    draw = random.Random(seed)
    pairs: list[list[tuple[str, str]]] = [[(GROUP, picture.thing.group)] for picture in pictures]
    for picture, asked in zip(pictures, pairs, strict=True):
        if names:
            asked.append((NAME, picture.thing.name))
    for kind in KINDS:
        sides: tuple[list[int], list[int]] = ([], [])
        for index, picture in enumerate(pictures):
            sides[kind in picture.thing.kinds].append(index)
        count = min(map(len, sides))
        for answer, side in zip(("no", "yes"), sides, strict=True):
            for index in draw.sample(side, count):
                pairs[index].append((f"is this {kind}?", answer))
    for asked in pairs:
        draw.shuffle(asked)
    return pairs
