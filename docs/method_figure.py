"""Draw the method: the three paths, what is cached, and where gradients go.

python docs/method_figure.py docs/method.svg
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyBboxPatch, Rectangle

WIDTH, HEIGHT = 1000, 696  # a hundred to the inch; the column of a README shows it at some 830
INK, SOFT = "#111827", "#4b5563"
# Edge and ground. The card is opaque, so that a dark page does not shine through.
CARD, BAND = ("#d1d5db", "#ffffff"), ("#e5e7eb", "#f9fafb")
FROZEN, TRAINED, CACHED, LOSS = (
    ("#6b7280", "#e5e7eb"),
    ("#2563eb", "#dbeafe"),
    ("#047857", "#d1fae5"),
    ("#c2410c", "#ffedd5"),
)
STYLE: dict[Any, Any] = {"svg.hashsalt": "cachekd", "svg.fonttype": "path", "mathtext.fontset": "dejavusans"}

# Name and left edge.
PARTS = {"V": ("vision encoder", 168), "P": ("projector", 346), "L": ("language model", 524)}
PART, TALL = 140, 58
DUMPED, OWN, SWITCHED = 556, 336, 164  # the middle of each path
LAST, LAST_WIDTH = 762, 176  # the last column: the cache, and below it the losses
NOTE = (
    "$P_T$ and $L_T$ are in memory, frozen: the gradient passes through them",
    "and trains $V_S$ alone. $V_T$ is not loaded.",
)
ABREAST = 9  # between a path's middle and its arrows: forward above, gradient below


class Drawing:
    """A figure whose coordinates are its pixels."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="none")
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, size: float = 11.5, **more: Any) -> None:
        self.axes.text(x, y, words, size=size, **{"color": INK, "va": "center", "ha": "center"} | more)

    def box(self, x: float, y: float, width: float, height: float, colors: tuple[str, str]) -> None:
        """Draw a rounded box; `y` is its middle."""
        shape = "round,pad=0,rounding_size=9"
        edge, ground = colors
        corner = (x, y - height / 2)
        self.axes.add_patch(
            FancyBboxPatch(corner, width, height, boxstyle=shape, ec=edge, fc=ground, linewidth=1.6)
        )

    def arrow(self, *points: tuple[float, float], color: str = INK, gradient: bool = False) -> None:
        """Draw a line through all points, with its head at the last one; a gradient is dashed."""
        look: dict[str, Any] = {"color": LOSS[0] if gradient else color, "linewidth": 1.7}
        look |= {"linestyle": (0, (3, 2))} if gradient else {}
        head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
        self.axes.plot(*zip(*points, strict=True), solid_joinstyle="round", **look)
        (x0, y0), (x, y) = points[-2:]
        length = abs(x - x0) + abs(y - y0)  # all lines are level or upright
        start = (x - 4 * (x - x0) / length, y - 4 * (y - y0) / length)
        self.axes.annotate("", (x, y), start, arrowprops=head | {"color": look["color"], "lw": 0})


def part(drawing: Drawing, name: str, owner: str, path: float) -> None:
    """V, P or L of the teacher, which is frozen, or of the student."""
    words, x = PARTS[name]
    drawing.box(x, path, PART, TALL, TRAINED if owner == "S" else FROZEN)
    drawing.text(x + PART / 2, path + 11, f"${name}_{owner}$", 16)
    drawing.text(x + PART / 2, path - 15, words, 11, color=SOFT)


def losses(drawing: Drawing, path: float, *terms: tuple[str, str]) -> None:
    """One box with all the terms that a path ends in."""
    drawing.box(LAST, path, LAST_WIDTH, 58 * len(terms), LOSS)
    for row, (name, words) in enumerate(terms):
        y = path + 58 * ((len(terms) - 1) / 2 - row)
        drawing.text(LAST + LAST_WIDTH / 2, y + 11, f"$\\mathcal{{L}}_\\mathrm{{{name}}}$", 15)
        drawing.text(LAST + LAST_WIDTH / 2, y - 14, words, 11, color=SOFT)


def band(drawing: Drawing, bottom: float, height: float, command: str, words: str) -> None:
    drawing.box(14, bottom + height / 2, WIDTH - 28, height, BAND)
    drawing.text(32, bottom + height - 24, command, 13, ha="left", weight="bold")
    drawing.text(192, bottom + height - 24.5, words, 12, ha="left", color=SOFT)


def inputs(drawing: Drawing, path: float) -> None:
    """Draw what V and L read."""
    drawing.text(78, path, "picture")
    drawing.arrow((114, path), (PARTS["V"][1] - 3, path))
    text_input(drawing, path)


def text_input(drawing: Drawing, path: float) -> None:
    middle, top = PARTS["L"][1] + PART / 2, path + TALL / 2
    drawing.arrow((middle, top + 24), (middle, top + 3))
    drawing.text(middle, top + 34, "question and answer", 11)


def between(drawing: Drawing, left: float, right: float, path: float, trained: bool) -> None:
    """Forward, and where something is trained the gradient back."""
    up = ABREAST if trained else 0
    drawing.arrow((left + 3, path + up), (right - 3, path + up))
    if trained:
        drawing.arrow((right - 3, path - up), (left + 3, path - up), gradient=True)


def chain(drawing: Drawing, path: float, names: str, trained: bool, end: float) -> None:
    starts = [*(PARTS[name][1] for name in names[1:]), end]
    for name, right in zip(names, starts, strict=True):
        between(drawing, PARTS[name][1] + PART, right, path, trained)


def cache(drawing: Drawing, y: float) -> None:
    """Draw a drum."""
    middle, half = LAST + LAST_WIDTH / 2, 46
    look: dict[str, Any] = {"ec": CACHED[0], "fc": CACHED[1], "linewidth": 1.6}
    drawing.axes.add_patch(Ellipse((middle, y - half), LAST_WIDTH, 22, **look))
    drawing.axes.add_patch(Rectangle((LAST, y - half), LAST_WIDTH, 2 * half, fc=CACHED[1]))
    for side in (LAST, LAST + LAST_WIDTH):
        drawing.axes.plot([side, side], [y - half, y + half], color=CACHED[0], linewidth=1.6)
    drawing.axes.add_patch(Ellipse((middle, y + half), LAST_WIDTH, 22, **look))
    drawing.text(middle, y + 17, "cache on disk", 13, weight="bold")
    drawing.text(middle, y - 8, "about 110 bytes")
    drawing.text(middle, y - 28, "per answer token")


def dump_band(drawing: Drawing) -> None:
    band(drawing, 472, 210, "cachekd dump", "The teacher (T) runs once over the data.")
    inputs(drawing, DUMPED)
    for name in PARTS:
        part(drawing, name, "T", DUMPED)
    chain(drawing, DUMPED, "VPL", False, LAST)
    drawing.text(713, DUMPED + 17, "$z_T$", 16)
    drawing.text(713, DUMPED - 18, "logits", 11, color=SOFT)
    cache(drawing, DUMPED)


def train_band(drawing: Drawing) -> None:
    band(drawing, 14, 446, "cachekd train", "The student (S) learns from the cache, as often as you like.")
    inputs(drawing, OWN)
    for name in PARTS:
        part(drawing, name, "S", OWN)
    for name in "PL":
        part(drawing, name, "T", SWITCHED)
    text_input(drawing, SWITCHED)
    losses(drawing, OWN, ("CE", "$z_S$ and true answer"), ("Align", "$z_S$ and $z_T$"))
    losses(drawing, SWITCHED, ("VSD", "$z_W$ and $z_T$"))
    chain(drawing, OWN, "VPL", True, LAST)
    chain(drawing, SWITCHED, "PL", True, LAST)
    for path, logits in ((OWN, "z_S"), (SWITCHED, "z_W")):
        drawing.text(713, path + 26, f"${logits}$", 16)
    switch(drawing)
    targets(drawing)
    for row, words in enumerate(NOTE):
        drawing.text(PARTS["P"][1], SWITCHED - 48 - 20 * row, words, ha="left", color=SOFT)
    legend(drawing, 42)


def switch(drawing: Drawing) -> None:
    """Draw what the switched path takes from the student, and gives back."""
    middle = PARTS["V"][1] + PART / 2
    top, right = OWN - TALL / 2 - 3, PARTS["P"][1] - 3
    outer, inner = middle - ABREAST, middle + ABREAST
    drawing.arrow((inner, top), (inner, SWITCHED + ABREAST), (right, SWITCHED + ABREAST))
    drawing.arrow((right, SWITCHED - ABREAST), (outer, SWITCHED - ABREAST), (outer, top), gradient=True)
    for row, words in enumerate(
        ("the switch: the student's", "visual features go to", "the teacher's projector")
    ):
        drawing.text(inner + 12, (OWN + SWITCHED) / 2 + 18 - 18 * row, words, 11, ha="left", color=SOFT)


def targets(drawing: Drawing) -> None:
    """Draw what the losses read from the cache."""
    right, line = LAST + LAST_WIDTH, LAST + LAST_WIDTH + 22
    drawing.axes.plot([right, line, line], [DUMPED, DUMPED, OWN - 29], color=CACHED[0], linewidth=1.7)
    drawing.arrow((line, OWN - 29), (right + 3, OWN - 29), color=CACHED[0])
    drawing.arrow((line, OWN - 29), (line, SWITCHED), (right + 3, SWITCHED), color=CACHED[0])
    drawing.text(line - 15, 480, "$z_T$", 15, color=CACHED[0])


def legend(drawing: Drawing, y: float) -> None:
    drawing.arrow((40, y), (82, y))
    drawing.text(92, y, "forward", ha="left")
    drawing.arrow((216, y), (174, y), gradient=True)
    drawing.text(226, y, "gradient", ha="left")
    for x, colors, words in ((316, TRAINED, "trained"), (432, FROZEN, "frozen")):
        drawing.box(x, y, 28, 18, colors)
        drawing.text(x + 38, y, words, ha="left")
    whole = "loss = " + r" + ".join(
        rf"${weight}\mathcal{{L}}_\mathrm{{{name}}}$"
        for weight, name in (("", "CE"), (r"\lambda_1", "Align"), (r"\lambda_2", "VSD"))
    )
    drawing.text(WIDTH - 40, y, whole, 14, ha="right")


def main(path: str) -> None:
    with matplotlib.rc_context(STYLE):
        drawing = Drawing()
        drawing.box(2, HEIGHT / 2, WIDTH - 4, HEIGHT - 4, CARD)
        dump_band(drawing)
        train_band(drawing)
        drawing.figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


if __name__ == "__main__":
    main(sys.argv[1])
