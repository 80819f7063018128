"""An image from whatever holds it: a path, bytes, a PIL image or a row of `datasets`."""

from __future__ import annotations

import errno
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from cachekd.errors import BadSample, CachekdError

# A path that a file system refuses for its own sake; any other OSError (too many open files, a failing disk)
# is not the sample's fault.
_UNREADABLE = (IsADirectoryError, NotADirectoryError, PermissionError, ValueError)


def open_image(source: Any, *, where: str, folder: Path | None = None) -> Image.Image:
    """Open an image, upright and in RGB.

    Args:
        source: a path, an encoded file's bytes, a PIL image, or `{"bytes", "path"}` as `datasets` stores it.
        where: the sample, for error messages.
        folder: what a relative path starts from; None: the current directory.

    Raises:
        BadSample: the image is missing, broken, or of none of these kinds.
        CachekdError: the disk could not be read, which says nothing about the sample.
    """
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, str | Path):
        source = _read(Path(folder or "") / source, where)
    if not isinstance(source, bytes | bytearray | Image.Image):
        raise BadSample(
            "an image is of an unknown kind",
            where=where,
            expected='a path, bytes, a PIL image, or {"bytes", "path"}',
            found=type(source).__name__,
        )
    try:
        if isinstance(source, Image.Image):
            return upright_rgb(source)
        with Image.open(io.BytesIO(source)) as image:
            return upright_rgb(image)
    except MemoryError:
        raise  # the machine's, not the image's: Pillow refuses absurd sizes before it allocates
    except Exception as error:
        # Not a list of classes: on broken files Pillow's decoders raise OSError, SyntaxError, ValueError,
        # struct.error, zlib.error, DecompressionBombError, IndexError, ...
        raise BadSample(
            "an image cannot be read",
            where=where,
            found=f"{type(error).__name__}: {error}",
            fix="replace the image, or leave the sample out",
        ) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Apply EXIF rotation, which image processors ignore, and convert to RGB."""
    return ImageOps.exif_transpose(image).convert("RGB")


def _read(path: Path, where: str) -> bytes:
    expected = f"an image at {path}"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadSample(
            "an image is missing",
            where=where,
            expected=expected,
            found="no such file",
            fix="restore the file, or remove the sample",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        name_too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        kind = BadSample if isinstance(error, _UNREADABLE) or name_too_long else CachekdError
        raise kind("an image cannot be read", where=where, expected=expected, found=str(error)) from None
