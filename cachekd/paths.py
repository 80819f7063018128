"""What is a path and what an address; and the names of files by which a cache or a run is known."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator

from cachekd.errors import CachekdError, did_you_mean, nearest

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}]*)\})", re.ASCII)
_AS_PATH = re.compile(r"([a-z][a-z0-9+.-]+):/(.*)")  # one letter is a drive
_MOST_ROUNDS = 16  # of variables in variables
_HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"  # one without a slash would be taken for a mistyped path
# A cache's on the hub: repository and revision.
HUB_CACHE = re.compile(rf"({_HUB_NAME})(?:@([^/@\s][^@\s]*))?/?", re.ASCII)
_QUERY = re.compile(r"(.+?)\?(\w+=.*)", re.DOTALL)  # not the wildcard of "train-00?.tar"
# Of which "data/x.json" is no name on the hub.
_DATA_FILES = (".json", ".jsonl", ".tar", ".gz", ".tgz", ".zip", ".parquet", ".arrow")


def expanded(value: Any) -> Any:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` replaced; of a list or tuple, each.

    What a variable holds is expanded in its turn: a path may pass here twice, as an option and as a setting,
    and the second time changes nothing. An address (`s3://...`) may have a `$` of its own and stays as it is,
    as does what is no path or text.

    Raises:
        ValueError: a variable is not set or leads back to itself, or there is no such user, and no path is
            called that.
    """
    if isinstance(value, list | tuple):
        return type(value)(map(expanded, value))
    if isinstance(value, Path):
        return Path(expanded(str(value)))
    if not isinstance(value, str):
        return value
    text = value
    for _ in range(_MOST_ROUNDS):
        if is_url(text):
            return text
        text = os.path.expanduser(text)
        names = [bare or braced for bare, braced in _VARIABLE.findall(text)]
        unset = [name for name in names if not os.environ.get(name)]
        if (unset or text.startswith("~")) and not os.path.lexists(text):
            raise ValueError(_unknown(unset[0]) if unset else _no_user(text))
        if unset or not names:
            return text
        text = _VARIABLE.sub(lambda found: os.environ[found[1] or found[2]], text)
    raise ValueError(f"the variable {names[0]} leads back to itself")


def _unknown(variable: str) -> str:
    return f"the variable {variable} is not set, or empty" if variable else "${} names no variable"


def _no_user(text: str) -> str:
    return f"there is no user {text.partition('/')[0][1:]!r}; ./{text} is a path of that name"


_PATH = BeforeValidator(expanded)
_TEXT = BeforeValidator(lambda value: expanded(str(value) if isinstance(value, Path) else value))
# Of settings and options. Every path has one of these types, which a test holds all of them to.
LocalPath = Annotated[Path, _PATH]
# A path, or else a name on the hub, an address or a step of a pipeline; a Path will do.
PathOrName = Annotated[str, _TEXT]


def takes_path(annotation: Any) -> bool:
    """Whether a type is, or has in it, `Path` or `PathOrName`."""
    return annotation in (Path, _TEXT) or any(takes_path(part) for part in get_args(annotation))


def is_path(name: str) -> bool:
    """Whether a name is a path of this disk, there or not, and no name of the hub's.

    That is: it begins as only a path does (`/`, `.`, `~`), or its first part is here.
    """
    first = name.partition("/")[0]
    return first in ("", ".", "..") or first.startswith("~") or os.path.lexists(first)


def is_hub_name(name: str) -> bool:
    """Whether a name is a model's or data set's on the hub, `org/name`, and no path of this disk."""
    return re.fullmatch(_HUB_NAME, name, re.ASCII) is not None and not is_path(name)


def split_query(spec: str) -> tuple[str, str]:
    """The name of a data set, and what stands after its `?`, as in `org/name?split=train`; "" for nothing."""
    found = None if os.path.lexists(spec) else _QUERY.fullmatch(spec)
    return (found[1], found[2]) if found else (spec, "")


def is_hub_data(spec: str) -> bool:
    """Whether data of the hub are meant, with or without a query, and nothing on this disk."""
    name, _ = split_query(spec)
    return is_hub_name(name) and not name.endswith(_DATA_FILES)


def is_url(name: str) -> bool:
    """Whether fsspec, rather than a path on this disk, is meant: `s3://...`, `simplecache::https://...`."""
    return "://" in name or "::" in name


def is_address(cache: str | Path) -> bool:
    """Whether a cache is not on this disk: `s3://...`, `hf://datasets/org/name`, `org/name[@revision]`."""
    if isinstance(cache, Path):
        return False
    return "://" in cache or (HUB_CACHE.fullmatch(cache) is not None and not is_path(cache))


def address_of(path: Path) -> str | None:
    """The address that was given where a path was meant, such as `s3://bucket/x`; None if it is a path."""
    if (match := _AS_PATH.fullmatch(path.as_posix())) is None:
        return None
    slashes = ":///" if match[1] == "file" else "://"  # of which a path keeps one
    return f"{match[1]}{slashes}{match[2]}"


def require_path(name: str, what: str, expected: str) -> None:
    """Refuse a path that is not there, before a hub is asked for half a minute; a hub's name passes.

    Args:
        what: that is looked for, as in "model".

    Raises:
        CachekdError: with what is there instead.
    """
    if is_path(name) and not os.path.lexists(name):
        found, fix = what_is_there(name)
        raise CachekdError(f"there is no such {what}", where=name, expected=expected, found=found, fix=fix)


def what_is_there(path: str | Path) -> tuple[str, str | None]:
    """Say what is in the place of a path that is not there, and what may have been meant.

    Returns:
        The last folder above it that is there, with up to five of its names; and advice, if one is near.
    """
    folder, wanted = Path(path), ""
    while not os.path.lexists(folder):
        folder, wanted = folder.parent, folder.name
    if not folder.exists():
        return f"{folder} is a link to {os.readlink(folder)}, which is not there", None
    if not folder.is_dir():
        return f"{folder} is a file", None
    try:
        here = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        return str(error), None
    near = nearest(wanted, here)
    here.sort(key=lambda name: name != near)  # which comes first
    holds = ", ".join(here[:5]) + (f" and {len(here) - 5} more" if len(here) > 5 else "")
    fix = did_you_mean(None if near is None else folder / near)
    return f"no {wanted!r} in {folder}/, which holds {holds or 'nothing'}", fix


def shortest(paths: Sequence[Path]) -> list[str]:
    """Different paths by their last parts, as many as tell them apart."""
    whole = [path.resolve() for path in paths]
    parts, most = 1, max((len(path.parts) for path in whole), default=1)
    while len(set(names := ["/".join(path.parts[-parts:]) for path in whole])) < len(paths) and parts < most:
        parts += 1
    return names


def cache_home() -> Path:
    """Where fetched caches are kept: $CACHEKD_HOME, or cachekd in the user's folder for such things."""
    if home := os.environ.get("CACHEKD_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cachekd"


MANIFEST_FILE = "manifest.json"  # a cache's, written last
RUN_FILE = "cachekd_run.json"  # configuration, versions, cache manifest, log
SCORES_FILE = "scores.json"  # of an evaluation, all rows
DATASET_DICT = "dataset_dict.json"  # of a folder with splits that `datasets` saved
EVALUATIONS_FOLDER = "evaluations"  # scores of the run, a file for each set of questions
BENCHMARKS_FOLDER = "benchmarks"  # in it: scores on public benchmarks, a file for each
REPORT_FILE = "report.html"
BRIDGE_FILE = "switch_bridge.safetensors"
ADAPTER_FOLDER = "adapter"  # in a run that trained adapters
