"""Which points of a pipeline a process does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from cachekd.errors import CachekdError, did_you_mean, nearest, some_of
from cachekd.pipeline.vary import Point, Sweep


def require_varying(sweep: Sweep) -> None:
    """Refuse to choose among the runs of a file that has one.

    Raises:
        CachekdError: nothing varies in it.
    """
    if not sweep.varies:
        raise CachekdError(
            "nothing varies in this file: there is one run of it",
            where=str(sweep.pipeline.out),
            fix="say `vary` or `seeds` in the file, or leave --only, --variant and --jobs out",
        )


def choose(sweep: Sweep, only: Sequence[str] = (), part: str | None = None) -> list[Point]:
    """The points that match a pattern, or this process' share of them.

    Args:
        only: patterns with *, ? and [..], of a value's name, of a point's values ("ce,limit=250"), of its
            seed ("seed-3"), or of both ("ce,limit=250/seed-3").
        part: "i/n", i from 0: every n-th point, from the i-th on.

    Raises:
        CachekdError: a pattern matches nothing, or `part` is none.
    """
    for pattern in only:
        if not any(_matches(point, pattern) for point in sweep.points):
            names = [value.name for axis in sweep.axes for value in axis.values]
            names += [f"seed-{seed}" for seed in sweep.pipeline.seeds or []]
            raise CachekdError(
                "no run of this file is called so",
                where="--only",
                expected=f"{some_of(names)}; or of a run, {sweep.points[-1].name}",
                found=pattern,
                fix=did_you_mean(nearest(pattern, [*names, *(point.name for point in sweep.points)])),
            )
    points = [point for point in sweep.points if not only or any(_matches(point, each) for each in only)]
    if part is None:
        return points
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    index, count = map(int, found.groups()) if found else (0, 0)
    if index >= count:
        raise CachekdError(
            "this is no share of the runs",
            where="--variant",
            expected="i/n with i from 0 to n - 1: 0/4, 1/4, 2/4 and 3/4 are all",
            found=part,
        )
    return points[index::count]


def labels_of(points: Iterable[Point]) -> set[str]:
    """The labels of the groups that do the steps of some points."""
    return {label for point in points for label in point.groups.values()}


def _matches(point: Point, pattern: str) -> bool:
    names = [*point.variant.values(), point.label, point.name]
    if point.seed is not None:
        names.append(f"seed-{point.seed}")
    return any(fnmatchcase(name, pattern) for name in names)
