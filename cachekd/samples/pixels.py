"""An image's pixels as a model is to see them: RGB with 8 bits, upright, on white."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

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
    """As transformers composes, bit for bit."""
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
