"""Images as people have them become RGB, and the identity of their pixels."""

from __future__ import annotations

import base64
import errno
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from cachekd.errors import BadSample, CachekdError, clipped

READING = 2
"""The version of `upright_rgb`, counted up whenever it makes other pixels of some image: caches record it.

Version 1, which no cache records, left transparency out, clipped 16-bit grey, `I` and `F` to 0-255, and read
white as black where a TIFF of more than 8 bits says that white is zero."""

_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
# Of these a 16-bit sample reaches from 0 to 65535; None: an image that came from no file. (FITS has negative
# ones and an offset, which Pillow ignores.)
_UNSIGNED_16 = ("PNG", "TIFF", "JPEG2000", "PPM", None)
# Pillow stretches grey samples of a PNG with fewer than 8 bits to 0-255, but not the transparent one.
_STRETCH = {"L;2": 85, "L;4": 17}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tags.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _SMALLEST, _LARGEST = 258, 262, 339, 340, 341
_WHITE_IS_ZERO, _SIGNED = 0, 2
# A path that a file system refuses for its own sake; any other OSError (too many open files, a failing disk)
# is not the sample's fault.
_UNREADABLE = (IsADirectoryError, NotADirectoryError, PermissionError, ValueError)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FORMS = 'a path, a "data:" URI, bytes, a PIL image, or {"bytes", "path"}'


class UnknownPixelsError(ValueError):
    """What an image's numbers stand for is not known."""


def upright_rgb(image: Image.Image) -> Image.Image:
    """Compose an image on white, scale it to 8 bits, convert it to RGB and turn it by its EXIF orientation.

    So do the image processors of all 13 families with transparency (`convert_to_rgb` of transformers, which
    their classes apply unless a folder's `preprocessor_config.json` has `do_convert_rgb` false or null; then
    they convert nothing). They do not turn, and they clip more than 8 bits of grey.

    - 16-bit grey is divided by 257 and rounded. (Of 16-bit colour Pillow keeps the high byte.)
    - `I` and `F` are scaled by the range that a TIFF states (SMinSampleValue, SMaxSampleValue).
    - Of several frames the current one is read; of a file just opened that is the first.
    - An orientation that cannot be read is none: then the pixels stand as they are stored, as in every viewer
      (and as Pillow itself has it for a JPEG whose EXIF block is damaged). Nothing else of EXIF is looked at.

    Raises:
        UnknownPixelsError: the image's numbers have no known range, or Pillow does not read them all (a
            transparent colour of 16 bits per channel).
        Exception: Pillow's, of many classes, on a broken file.
    """
    raw_mode = _raw_mode(image)
    image.load()  # a PNG's EXIF may follow its pixels; a TIFF is turned by this
    turn = _TURNS.get(_orientation(image))
    rgb = _rgb(image, raw_mode)
    return rgb if turn is None else rgb.transpose(turn)


def _raw_mode(image: Image.Image) -> str | None:
    """How a PNG's samples are stored; None of others, and once it is loaded."""
    tiles = getattr(image, "tile", None) if image.format == "PNG" else None
    return str(tiles[0][3]) if tiles else None


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # by the kind of damage: SyntaxError, struct.error, ValueError, ...
        return None


def _rgb(image: Image.Image, raw_mode: str | None) -> Image.Image:
    if image.mode in (*_GREY_16, "I", "F"):
        return _scaled(image).convert("RGB")
    if image.mode == "L" and _tag(image, _SAMPLE_FORMAT) == _SIGNED:
        raise UnknownPixelsError("signed samples of 8 bits")
    return _on_white(image, raw_mode) if image.has_transparency_data else image.convert("RGB")


def _on_white(image: Image.Image, raw_mode: str | None) -> Image.Image:
    """Compose on white as transformers does, bit for bit."""
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and (raw_mode == "RGB;16B" or max(transparent) > 255):
        raise UnknownPixelsError("a transparent colour of 16 bits per channel")
    if isinstance(transparent, int) and raw_mode in _STRETCH:
        image = image.copy()
        image.info["transparency"] = transparent * _STRETCH[raw_mode]
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as `L`, black at the lower end of its range and white at the upper."""
    low, high = _range(image)
    stored: NDArray[Any] = np.asarray(image)
    if image.mode == "I" and _tag(image, _SAMPLE_FORMAT) != _SIGNED:
        stored = stored.view(np.uint32)
    light = np.clip((stored - low) * (255 / (high - low)), 0, 255)
    if np.isnan(light).any():
        raise UnknownPixelsError("numbers that are not finite")
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        light = 255 - light
    grey = np.floor(light + 0.5).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[stored == transparent] = 255
    return Image.fromarray(grey)


def _range(image: Image.Image) -> tuple[float, float]:
    """The numbers that are black and white (or white and black)."""
    known_16 = _UNSIGNED_16 if image.mode in _GREY_16 else ("PNG", "PPM")  # these have `I` for 16 bits
    if image.mode != "F" and image.format in known_16:
        return 0.0, 4095.0 if _tag(image, _BITS) == 12 else 65535.0
    low, high = _tag(image, _SMALLEST), _tag(image, _LARGEST)
    if low is None or high is None or not (np.isfinite([low, high]).all() and low < high):
        raise UnknownPixelsError(f"numbers of mode {image.mode}, and nothing says which are black and white")
    return float(low), float(high)


def _tag(image: Image.Image, number: int) -> Any:
    """The first value of a TIFF's tag; None without it."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


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
