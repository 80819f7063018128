"""What is written where a path is meant: `~` and variables in it, and whether it is one at all."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator

from cachekd.errors import CachekdError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}]*)\})", re.ASCII)
_ADDRESS = re.compile(r"://|::")
# A cache's on the hub: repository and revision.
HUB_CACHE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^/@\s][^@\s]*))?/?")


def expanded(value: Any) -> Any:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` replaced; of a list or tuple, each.

    An address (`s3://...`) may have a `$` of its own and stays as it is, as does what is no path or text.

    Raises:
        ValueError: a variable is not set, or there is no such user, and no path is called that.
    """
    if isinstance(value, list | tuple):
        return type(value)(map(expanded, value))
    if isinstance(value, Path):
        return Path(expanded(str(value)))
    if not isinstance(value, str) or _ADDRESS.search(value):
        return value
    text = os.path.expanduser(value)
    names = [bare or braced for bare, braced in _VARIABLE.findall(text)]
    unset = [name for name in names if not os.environ.get(name)]
    if (unset or text.startswith("~")) and not os.path.lexists(text):
        raise ValueError(
            f"the variable {unset[0]} is not set, or empty"
            if unset
            else f"there is no user {text.partition('/')[0][1:]!r}; ./{text} is a path of that name"
        )
    return text if unset else _VARIABLE.sub(lambda found: os.environ[found[1] or found[2]], text)


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


def is_address(cache: str | Path) -> bool:
    """Whether a cache is not on this disk: `s3://...`, `hf://datasets/org/name`, `org/name[@revision]`."""
    if isinstance(cache, Path):
        return False
    return "://" in cache or (HUB_CACHE.fullmatch(cache) is not None and not is_path(cache))


def require_path(name: str, what: str, expected: str) -> None:
    """Refuse a path that is not there, before a hub is asked for half a minute; a hub's name passes.

    Args:
        what: that is looked for, as in "model".

    Raises:
        CachekdError: with what is beside it.
    """
    if is_path(name) and not os.path.lexists(name):
        found, fix = beside(name)
        raise CachekdError(f"there is no such {what}", where=name, expected=expected, found=found, fix=fix)


def beside(path: str | Path) -> tuple[str, str | None]:
    """Of a path that is not there: what is, in words, and what may have been meant.

    Returns:
        The last folder above it that is there, with up to five of its names; and advice, if one is near.
    """
    folder, wanted = Path(path), ""
    while not os.path.lexists(folder):
        folder, wanted = folder.parent, folder.name
    if not folder.is_dir():
        return f"{folder} is a file", None
    try:
        here = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        return str(error), None
    near = get_close_matches(wanted, here, 1)
    others = f" and {len(here) - 5} more" if len(here) > 5 else ""
    holds = ", ".join([*near, *(name for name in here if name not in near)][:5]) + others
    fix = f"did you mean {folder / near[0]}?" if near else None
    return f"no {wanted!r} in {folder}/, which holds {holds or 'nothing'}", fix
