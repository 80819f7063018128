"""Which data set was meant, where a name is none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

_KINDS = (".json", ".jsonl", ".tar", ".parquet")
_DEPTH = ("*", "*/*", "*/*/*")
_MOST = 1_000  # entries of a folder that are looked at


def near_data(path: Path) -> Path | None:
    """What lies beside a path that does not exist, under nearly its name; None if nothing does."""
    with suppress(OSError):  # a name that is too long
        here = [] if path.name == "" else list(islice(path.parent.iterdir(), _MOST))
        same = [other for other in here if other.suffix in _KINDS and other.stem == path.stem]
        if same:
            return likeliest(same, path.name)
        names = get_close_matches(path.name, [other.name for other in here], 1, 0.8)
        return path.with_name(names[0]) if names else None
    return None


def data_in(path: Path) -> Path | None:
    """A data set somewhere in a folder that is none itself; None if there is none."""
    for pattern in _DEPTH if path.is_dir() else ():
        found = [file for file in islice(path.glob(pattern), _MOST) if file.suffix in _KINDS]
        if found:
            best = likeliest(found, path.name)
            return best if best.suffix in (".json", ".jsonl") else best.parent
    return None


def likeliest(files: Sequence[Path], name: str) -> Path:
    """The one that is called as the folder is, or train; else the first."""
    return min(files, key=lambda file: (file.stem != name, file.stem != "train", str(file)))
