"""Image files with samples that are known: by struct and zlib where Pillow writes no such file."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

_PNG_COLOURS = {1: 0, 3: 2, 2: 4, 4: 6}  # samples per pixel -> colour type
_TIFF_TYPES = {"B": 1, "H": 3, "I": 4, "f": 11, "d": 12, "i": 9}


def saved(image: Image.Image, form: str, **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def png(samples: Any, depth: int, *, transparent: Sequence[int] = ()) -> bytes:
    """A PNG of samples [h, w] or [h, w, c] with `depth` bits, and the one that is transparent (tRNS)."""
    rows = np.atleast_3d(np.asarray(samples))
    height, width, channels = rows.shape
    packed = b"".join(b"\0" + _packed(row.reshape(-1).tolist(), depth) for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, _PNG_COLOURS[channels], 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(packed)), _chunk(b"IEND", b"")]
    if len(transparent):
        chunks.insert(1, _chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _packed(samples: list[int], depth: int) -> bytes:
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(
    samples: Any, *, photometric: int = 1, big: bool = False, bits: int | None = None, **tags: Any
) -> bytes:
    """A TIFF of one strip.

    Args:
        samples: [h, w] or [h, w, c], of the type as which they are written (whole bytes each).
        big: whether in big-endian order.
        tags: further ones: `t339=("H", 3)` is tag 339, one or more values.
    """
    values = np.asarray(samples)
    height, width, channels = np.atleast_3d(values).shape
    order = ">" if big else "<"
    strip = values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries: dict[int, tuple[Any, ...]] = {
        256: ("I", width),
        257: ("I", height),
        258: ("H", *[bits or 8 * values.itemsize] * channels),
        259: ("H", 1),
        262: ("H", photometric),
        273: ("I", 8),
        277: ("H", channels),
        278: ("I", height),
        279: ("I", len(strip)),
    } | {int(name[1:]): tuple(value) for name, value in tags.items()}
    place, directory, far = 8 + len(strip), b"", b""
    behind = place + 2 + 12 * len(entries) + 4
    for tag, (kind, *numbers) in sorted(entries.items()):
        data = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        directory += struct.pack(f"{order}HHI", tag, _TIFF_TYPES[kind], len(numbers))
        if len(data) > 4:
            directory += struct.pack(f"{order}I", behind + len(far))
            far += data
        else:
            directory += data.ljust(4, b"\0")
    start = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", place)
    count = struct.pack(f"{order}H", len(entries))
    return start + strip + count + directory + bytes(4) + far


def exif(orientation: int, *, odd: bool = False, kind: int = 3) -> bytes:
    """An EXIF block. The odd tag, a unit that is text instead of a number, cannot be written back."""
    entries = [struct.pack("<HHIHH", 0x0112, kind, 1, orientation, 0)]
    if odd:
        entries.append(struct.pack("<HHI4s", 0x0128, 2, 4, b"ich\0"))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"Exif\0\0II*\0\x08\0\0\0" + directory
