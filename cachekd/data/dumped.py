"""Reading data as a dump read them, by what its manifest says."""

from __future__ import annotations

from typing import Any

from cachekd.cache.manifest import DataInfo
from cachekd.config import DataOptions
from cachekd.data.map_function import require_map

# Which sample a record becomes, under which key, with which tokens; not how many of them.
_LENGTHS = ("max_tokens", "too_long")
_AS_DUMPED = ("key", "image_field", *_LENGTHS)


def as_dumped(options: DataOptions, info: DataInfo, where: str, *, bound: bool = False) -> DataOptions:
    """The user's options, and what they do not say as the dump had it.

    Args:
        where: the cache.
        bound: they are other data than the dump's, bound to the cache: how records become samples is theirs.

    Raises:
        CachekdError: the dump had a map function, which only the user may name, and they do not.
    """
    if bound:
        return options.model_copy(update=unsaid(options, info, *_LENGTHS))
    map_function = require_map(options.map, info.map, where)
    return options.model_copy(update={**unsaid(options, info, *_AS_DUMPED), "map": map_function})


def unsaid(options: DataOptions, dumped: DataInfo | DataOptions, *names: str) -> dict[str, Any]:
    """Those of these options that the user does not say, as the dump had them."""
    return {name: getattr(dumped, name) for name in names if name not in options.model_fields_set}
