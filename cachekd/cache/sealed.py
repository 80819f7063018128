"""JSON files that notice damage: each carries a sha256 over the rest of itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from cachekd.cache.files import read_plain
from cachekd.errors import CachekdError

MOST_JSON = 2**25  # bytes; some 50,000 shards
_RESTORE = "restore it from where the cache came from, or run `cachekd verify --repair`"


LATER = "later"  # marks a field, in Annotated, that came after the first caches


class Part(BaseModel):
    """A part of such a file: closed and unchanging.

    A field that is marked `LATER` is left out of the JSON where it is at its default, so that a version
    without it can still read what has nothing to say there: docs/format.md, compatibility.
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

    sha256: str | None = Field(
        None, description="over the rest of the file: JSON, two spaces of indent, not ASCII only"
    )

    def to_json(self) -> bytes:
        """As it stands in the file: the same content gives the same bytes."""
        values = self.model_dump(mode="json", exclude={"sha256"})
        return _text(values | {"sha256": _seal(values)})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read such a file.

        Raises:
            CachekdError: it is missing, damaged, or of another form.
        """
        return cls.parse(path, read_json(path))

    @classmethod
    def parse(cls, path: Path, values: Any) -> Self:
        """Check what `read_json` has read."""
        if not isinstance(values, dict):
            raise cannot_be_read(path, f"{type(values).__name__}, expected an object")
        try:
            found = _seal({name: value for name, value in values.items() if name != "sha256"})
            model = cls.model_validate(values)
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
                fix=_RESTORE,
            )
        return model


def read_json(path: Path) -> Any:
    """The file's JSON.

    Raises:
        CachekdError: it is missing or not JSON.
    """
    try:
        return json.loads(read_plain(path, MOST_JSON).decode())
    except (ValueError, RecursionError) as error:
        raise cannot_be_read(path, str(error)) from None
    except OSError as error:
        raise cannot_be_read(path, error.strerror or str(error)) from None


def is_canonical(path: Path) -> bool:
    """Whether a readable file has the very bytes that `to_json` would give."""
    return path.read_bytes() == _text(json.loads(path.read_bytes()))


def cannot_be_read(path: Path, found: str) -> CachekdError:
    """The error for a file that is no such JSON."""
    return CachekdError(f"{path.name} cannot be read", where=str(path), found=found, fix=_RESTORE)


def _does_not_fit(path: Path, error: ValidationError) -> CachekdError:
    first = error.errors()[0]
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
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _seal(values: dict[str, Any]) -> str:
    return hashlib.sha256(_text(values)).hexdigest()
