"""JSON files that notice damage: each carries a sha256 over the rest of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from cachekd.atomic import read_plain
from cachekd.config.fields import EXACT, LATER
from cachekd.errors import CachekdError

RESTORE = "fetch it from where the cache came from, or run `cachekd verify --repair`"

MOST_JSON = 2**25  # bytes; some 50,000 shards
MOST_FIELDS = 2**8  # of one object
# In such a file: a shard has some 20, and each takes up to 200 bytes once it is parsed.
MOST_VALUES = 3 * 2**19


Count = Annotated[int, Field(ge=0, le=EXACT)]
Positive = Annotated[int, Field(gt=0, le=EXACT)]


class Part(BaseModel):
    """A part of such a file: closed and unchanging.

    A field that is marked `LATER` is left out of the JSON where it is at its default, so that a version
    without it can still read what has nothing to say there: docs/reference/format.md, compatibility.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_silent_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        silent = {n for n, f in fields.items() if LATER in f.metadata and getattr(self, n) == f.default}
        return {name: value for name, value in values.items() if name not in silent}


class Sealed(Part):
    """A whole file."""

    most_fields: ClassVar[int] = MOST_FIELDS
    sha256: str | None = Field(
        None, description="over the rest of the file: JSON, two spaces of indent, not ASCII only"
    )

    def to_json(self) -> bytes:
        """Write it as it stands in the file: the same content gives the same bytes."""
        values = self.model_dump(mode="json", exclude={"sha256"})
        return _text(values | {"sha256": _seal(values)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read such a file.

        Raises:
            CachekdError: it is missing, damaged, or of another form.
        """
        return cls.parse(path, read_json(path, cls.most_fields))

    @classmethod
    def parse(cls, path: Path, values: Any) -> Self:
        """Check what `read_json` has read."""
        if not isinstance(values, dict):
            raise cannot_be_read(path, f"{type(values).__name__}, expected an object")
        try:
            model = cls.model_validate(values, strict=True)  # "17", 17.0 and true are no integers
            found = _seal({name: value for name, value in values.items() if name != "sha256"})
        except ValidationError as error:
            raise _does_not_fit(path, error) from None
        except (ValueError, RecursionError) as error:  # lone surrogates, infinite numbers, endless nesting
            raise cannot_be_read(path, str(error)) from None
        if found != model.sha256:
            raise CachekdError(
                f"{path.name} was changed after it was written",
                where=str(path),
                expected=f"sha256 {found} over its content",
                found=model.sha256,
                fix=RESTORE,
            )
        return model


def as_tuple(value: Any) -> Any:
    """Turn a list into a tuple, which JSON does not have."""
    return tuple(value) if isinstance(value, list) else value


def read_json(path: Path, most_fields: int = MOST_FIELDS) -> Any:
    """The file's JSON.

    Args:
        most_fields: that an object in it may have.

    Raises:
        CachekdError: it is missing or not JSON.
    """
    try:
        content = read_plain(path, MOST_JSON)
        # Every value but the first of its list or object has a comma before it.
        if (values := sum(map(content.count, (b",", b"[", b"{")))) > MOST_VALUES:
            raise cannot_be_read(path, f"some {values:,} values, expected {MOST_VALUES:,} at most")
        return json.loads(content.decode(), object_hook=partial(_require_few, most_fields))
    except (ValueError, RecursionError) as error:
        raise cannot_be_read(path, str(error)) from None
    except OSError as error:
        raise cannot_be_read(path, error.strerror or str(error)) from None


def _require_few(most: int, fields: dict[str, Any]) -> dict[str, Any]:
    """pydantic notes each field that it does not know, in two kilobytes."""
    if len(fields) > most:
        raise ValueError(f"an object with {len(fields):,} fields, expected {most:,} at most")
    return fields


def is_canonical(path: Path) -> bool:
    """Whether a readable file has the very bytes that `to_json` would give."""
    return path.read_bytes() == _text(json.loads(path.read_bytes()))


def cannot_be_read(path: Path, found: str) -> CachekdError:
    """The error for a file that is no such JSON."""
    return CachekdError(f"{path.name} cannot be read", where=str(path), found=found, fix=RESTORE)


def _does_not_fit(path: Path, error: ValidationError) -> CachekdError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:500]
    if first["type"] != "extra_forbidden":
        return cannot_be_read(path, found)
    return CachekdError(
        f"{path.name} cannot be read: it has a field that this version does not know",
        where=str(path),
        found=found,
        fix="if a newer cachekd wrote it: pip install --upgrade cachekd",
    )


def _text(values: dict[str, Any]) -> bytes:
    return b"".join(_pieces(values))


def _seal(values: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(values):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(values: dict[str, Any]) -> Iterator[bytes]:
    """The text, some thousand values at a time: `json.dumps` would hold a string for each."""
    parts = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False).iterencode(values)
    while some := "".join(islice(parts, 2**14)):
        yield some.encode()
    yield b"\n"
