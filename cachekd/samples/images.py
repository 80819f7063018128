"""An image from whatever holds it: a path, a data: URI, bytes, a PIL image or a row of `datasets`."""

from __future__ import annotations

import base64
import errno
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from PIL import Image, UnidentifiedImageError

from cachekd.errors import BadSample, CachekdError, clipped
from cachekd.samples.pixels import UnknownPixelsError, upright_rgb

# A path that a file system refuses for its own sake; any other OSError (too many open files, a failing disk)
# is not the sample's fault.
_UNREADABLE = (IsADirectoryError, NotADirectoryError, PermissionError, ValueError)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FORMS = 'a path, a "data:" URI, bytes, a PIL image, or {"bytes", "path"}'


def open_image(
    source: Any, *, where: str, folder: Path | None = None, name: str | None = None
) -> Image.Image:
    """Open an image, upright, on white and in RGB: see `upright_rgb`.

    Args:
        source: a path (also as `file:///...`, percent-encoded), a `data:` URI, an encoded file's bytes, a PIL
            image, or `{"bytes", "path"}` as `datasets` stores it.
        where: the sample, for error messages.
        folder: what a relative path starts from; None: the current directory.
        name: the image, for error messages, where the data have no path of it.

    Raises:
        BadSample: the image is missing, broken, an address, of none of these kinds, or its numbers have no
            known range.
        CachekdError: the disk could not be read, which says nothing about the sample.
    """
    given = source
    if isinstance(source, Mapping):
        content, path = source.get("bytes"), source.get("path")
        if content is None:
            source = path
        else:
            source, name = content, str(path or "") or name
    if isinstance(source, str | Path):
        source, name = _content(source, where, folder, name)
    image = _named(name)
    if not isinstance(source, bytes | bytearray | Image.Image):
        raise BadSample(f"{image} is of an unknown kind", where=where, expected=_FORMS, found=_kind(given))
    try:
        if isinstance(source, Image.Image):
            return upright_rgb(source)
        with Image.open(io.BytesIO(source)) as opened:
            return upright_rgb(opened)
    except MemoryError:
        raise  # the machine's, not the image's: Pillow refuses absurd sizes before it allocates
    except UnidentifiedImageError as error:
        raise _unreadable(image, where, "not a picture in any format that Pillow knows") from error
    except UnknownPixelsError as error:
        fix = "save it with 8 bits per channel; a TIFF may state SMinSampleValue and SMaxSampleValue instead"
        raise _unreadable(image, where, str(error), fix) from error
    except Exception as error:
        # Not a list of classes: on broken files Pillow's decoders raise OSError, SyntaxError, ValueError,
        # struct.error, zlib.error, DecompressionBombError, IndexError, ...
        raise _unreadable(image, where, f"{type(error).__name__}: {error}") from error


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
    return type(value).__name__


def _named(name: str | None) -> str:
    return "an image" if name is None else f"the image {clipped(name, 100)!r}"


def _unreadable(
    image: str, where: str, found: str, fix: str = "replace the image, or leave the sample out"
) -> BadSample:
    return BadSample(f"{image} cannot be read", where=where, found=found, fix=fix)


def _content(
    source: str | Path, where: str, folder: Path | None, name: str | None
) -> tuple[bytes, str | None]:
    """What a path or a URI holds, and the image's name."""
    if not isinstance(source, str):
        return _read(Path(folder or "") / source, where, str(source)), str(source)
    if source[:5].lower() == "data:":
        return _data_uri(source, where, name), name
    path: str | None = source
    if (address := _ADDRESS.match(source)) is not None:
        path = _local(source) if address[1].lower() == "file" else None
    if path is None:
        raise BadSample(
            f"{_named(source)} is an address, and images are not fetched from one",
            where=where,
            expected=_FORMS,
            fix="download the images and name their files instead: a cache must not depend on what an "
            "address gives another day",
        )
    return _read(Path(folder or "") / path, where, source), source


def _local(address: str) -> str | None:
    """The path of a file:// address; None where it is on another machine."""
    host, slash, path = address[len("file://") :].partition("/")
    return unquote(slash + path) if host in ("", "localhost") else None


def _data_uri(source: str, where: str, name: str | None) -> bytes:
    kind, comma, text = source[5:].partition(",")
    content = unquote_to_bytes(text)
    if comma and not kind.lower().endswith(";base64"):
        return content
    try:
        if not comma:
            raise ValueError("no comma before its data")
        content = b"".join(content.split())
        return base64.b64decode(
            content + b"=" * (-len(content) % 4), validate=True
        )  # padding may be left out
    except ValueError as error:
        raise _unreadable(_named(name), where, f"a data: URI, {len(source):,} characters: {error}") from None


def _read(path: Path, where: str, name: str) -> bytes:
    expected = f"an image at {path}"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadSample(
            f"{_named(name)} is missing",
            where=where,
            expected=expected,
            found="no such file",
            fix="restore the file, or remove the sample",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        problem = f"{_named(name)} cannot be read"
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise BadSample(
                problem,
                where=where,
                expected=_FORMS,
                found=f"a name of {len(name):,} characters",
                fix='an image that is written as text needs "data:image/png;base64," before it',
            ) from None
        kind = BadSample if isinstance(error, _UNREADABLE) else CachekdError
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise kind(problem, where=where, expected=expected, found=found) from None
