"""Which of a record's fields are its pictures, and what only looks like one.

A sample without a picture is text. So whatever looks like a picture and is not taken is refused by its dotted
name: under another name it would make text of the sample in silence.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from PIL import Image

from cachekd.data.conversation import SYSTEM_FIELDS, TURN_FIELDS
from cachekd.data.turn_fields import IMAGES_BESIDE, MEDIA_FIX, is_given
from cachekd.errors import BadSample

IMAGE_FIELDS = ("image", "images")
# The usual ones first: messages name these.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl"),
    *(".apng", ".dib", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".pbm", ".pgm", ".pnm", ".ppm", ".qoi"),
    *(".svg", ".tga"),
)
_MEDIA_SUFFIXES = (
    *(".mp4", ".m4v", ".avi", ".webm", ".mov", ".mkv"),
    *(".mp3", ".m4a", ".wav", ".flac", ".ogg"),
)
_LONGEST_PATH, _LONGEST_WITH_SPACES = 400, 100  # characters; what is longer is prose
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\0\0\0\x0cJXL ")
_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # of PNG, JPEG, GIF and WebP
_SHORTEST_BASE64 = 64  # characters; no picture is smaller
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # of ISO media that are pictures
# Tuples are quicker than unions, and a mix has a million records.
_NUMBERS, _LISTS, _BYTES = (int, float, type(None)), (list, tuple), (bytes, bytearray, memoryview)
# What is read for other things; a turn's text may end in anything.
_SAID = frozenset(("from", "value", "role", "content"))
_READ = frozenset((*SYSTEM_FIELDS, "tools", *(f"{turns}.{name}" for turns in TURN_FIELDS for name in _SAID)))


class Picture(NamedTuple):
    """A picture of a record, not opened yet.

    Attributes:
        name: where it stands, as in `images[1]`.
        source: as `open_image` takes it.
    """

    name: str
    source: Any


class _Found(NamedTuple):
    """What looks like a picture: where, its path or address if it has one, and whether it is held itself.

    Or what looks like video or audio.
    """

    name: str
    file: str
    embedded: bool = False
    is_media: bool = False


def pictures_of(record: Mapping[str, Any], image_fields: Sequence[str] = ()) -> list[Picture]:
    """A record's pictures, in order. None, an empty text and an empty list are none.

    Args:
        record: as `sample_from_record` takes it.
        image_fields: dotted names of the fields that hold them, each one picture or a list; on their way
            lists of mappings are gone through. Without them, `image` or else `images` is taken.
    """
    if image_fields:
        return [picture for name in image_fields for picture in _listed(name, value_at(record, name))]
    listed = (_listed(name, record.get(name)) for name in IMAGE_FIELDS)
    return next((pictures for pictures in listed if pictures), [])


def decoded(source: Any) -> Any:
    """The bytes of a picture that is written as base64; anything else as it is."""
    if not isinstance(source, str) or not _is_base64(source):
        return source
    try:
        return base64.b64decode(source)
    except ValueError:  # cut off
        return source


def refuse_untaken(
    record: Mapping[str, Any], pictures: Sequence[Picture], where: str, image_fields: Sequence[str] = ()
) -> None:
    """Refuse a record that has more pictures than its fields gave.

    Beside one that was taken, what only names a file may be its metadata: an address on the web, or its own
    name. A picture that is held itself (bytes, a PIL image) has no name, so one name elsewhere may be its.

    Args:
        record: as `sample_from_record` takes it.
        pictures: what was taken.
        where: the sample, for error messages.
        image_fields: where they were looked for; empty: in `image` and `images`.

    Raises:
        BadSample: what looks like a picture was not taken, or there is video or audio and no picture.
    """
    taken = pictures[0].name.partition("[")[0] if pictures else None
    looking_so = list(_pictures_elsewhere(record, taken))
    media = [other for other in looking_so if other.is_media]
    if media and not pictures:  # else it may say where the pictures are from
        raise BadSample(
            "the sample has video or audio, which is not read",
            where=where,
            expected="text and images",
            found=f"{media[0].name}: {media[0].file}",
            fix=MEDIA_FIX,
        )
    found = [other for other in looking_so if not other.is_media]
    if pictures and found:
        found = _without_metadata(found, pictures)
    if found:
        raise _untaken(list(dict.fromkeys(other.name for other in found)), taken, where, image_fields)


def _without_metadata(found: list[_Found], pictures: Sequence[Picture]) -> list[_Found]:
    sources = [_picture_in(picture.name, picture.source) for picture in pictures]
    names = [source.file for source in sources if source and source.file]
    found = [
        other
        for other in found
        if other.embedded
        or not (_is_on_the_web(other.file) or any(_is_same(other.file, name) for name in names))
    ]
    nameless = len(pictures) - len(names)
    embedded = any(other.embedded for other in found)
    return found if embedded or len({_file_name(other.file) for other in found}) > nameless else []


def _untaken(found: list[str], taken: str | None, where: str, image_fields: Sequence[str]) -> BadSample:
    first = next((name for name in found if name.partition(".")[0] not in TURN_FIELDS), None)
    fix = IMAGES_BESIDE if first is None else how_to_take(first, taken=taken, asked=image_fields)
    expected = " or ".join(image_fields or IMAGE_FIELDS) if taken is None else f"images in {taken} alone"
    return under_another_name(where, expected, ", ".join(found), fix)


def under_another_name(where: str, expected: str, found: str, fix: str) -> BadSample:
    """What to tell of a sample with an image that was not taken: it would become text."""
    problem = "the sample has an image under another name"
    return BadSample(problem, where=where, expected=expected, found=found, fix=fix)


def how_to_take(name: str, *, taken: str | None = None, asked: Sequence[str] = ()) -> str:
    """What to do about an image that was not taken.

    Args:
        name: of its field.
        taken: the field that was taken in its place.
        asked: the fields that were asked for, and hold nothing.
    """
    if taken is not None:
        return f"--image-field {taken} to take this alone, and --image-field {name} to take that too"
    named = " ".join(f"--image-field {field}" for field in (*asked, name))
    return f"{named} to take it, or --map module:function, which makes such a record"


def _listed(name: str, value: Any) -> list[Picture]:
    # Nothing of no bytes is a broken picture.
    if not is_given(value) and not isinstance(value, _BYTES):
        return []
    if isinstance(value, _LISTS):
        return [Picture(f"{name}[{number}]", one) for number, one in enumerate(value)]
    return [Picture(name, value)]


def value_at(value: Any, path: str) -> Any:
    """What a dotted name stands for; names may have dots themselves."""
    if isinstance(value, _LISTS):
        return [picture.source for item in value for picture in _listed("", value_at(item, path))]
    if not isinstance(value, Mapping):
        return None
    if path in value:
        return value[path]
    cuts = (match.start() for match in re.finditer(r"\.", path))
    cut = next((cut for cut in cuts if path[:cut] in value), None)
    return None if cut is None else value_at(value[path[:cut]], path[cut + 1 :])


def _pictures_elsewhere(record: Mapping[str, Any], taken: str | None) -> Iterator[_Found]:
    """What looks like a picture, by its dotted name, which is a list's for what is in it."""
    waiting = [(name, value) for name, value in record.items() if name != taken]
    while waiting:
        name, value = waiting.pop()
        if name in _READ or isinstance(value, _NUMBERS):
            continue
        if found := _picture_in(name, value):
            yield found
        elif isinstance(value, Mapping):
            waiting += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, _LISTS) and not (name in TURN_FIELDS and all(map(_only_says, value))):
            waiting += [(name, inner) for inner in value if not isinstance(inner, _NUMBERS)]


def _only_says(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.keys() <= _SAID


def _picture_in(name: str, value: Any) -> _Found | None:
    """What of a value is a picture or names one; not what is within a list, or deeper in a mapping."""
    if isinstance(value, PurePath):
        value = str(value)
    if isinstance(value, str):
        if value[:11].lower() == "data:image/" or _is_base64(value):
            return _Found(name, "", embedded=True)
        if _names(value, IMAGE_SUFFIXES):
            return _Found(name, value)
        return _Found(name, value, is_media=True) if _names(value, _MEDIA_SUFFIXES) else None
    if isinstance(value, _BYTES):
        return _Found(name, "", embedded=True) if _has_magic(bytes(value[:16])) else None
    if isinstance(value, Image.Image):
        return _Found(name, "", embedded=True)
    if not isinstance(value, Mapping):
        return None
    # As `datasets` stores a picture.
    content, path = value.get("bytes"), value.get("path")
    named = path if isinstance(path, str) and _names(path, IMAGE_SUFFIXES) else ""
    held = isinstance(content, _BYTES) and (named or _has_magic(bytes(content[:16])))
    return _Found(name, named, embedded=bool(held)) if held or named else None


def _names(text: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a text is the path or address of a file with one of these suffixes."""
    if len(text) > _LONGEST_PATH or "." not in text:
        return False
    text = text.strip().lower()
    # Of an address the query may name the file.
    if not (_without_query(text).endswith(suffixes) or (_is_on_the_web(text) and text.endswith(suffixes))):
        return False
    return len(text) <= _LONGEST_WITH_SPACES or len(text.split()) == 1


def _has_magic(start: bytes) -> bool:
    return (
        start.startswith(_MAGIC)
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[:2] == b"BM" and start[6:10] == bytes(4))  # a bitmap's size is in between
        or (start[4:8] == b"ftyp" and start[8:12] in _BRANDS)
    )


def _is_base64(text: str) -> bool:
    return text.startswith(_BASE64) and len(text) >= _SHORTEST_BASE64 and not _names(text, IMAGE_SUFFIXES)


def _without_query(text: str) -> str:
    return text.partition("?")[0].partition("#")[0]


def _is_on_the_web(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _is_same(one: str, other: str) -> bool:
    """Whether two paths may be of one file: `1.png` may be `left/1.png`, `right/1.png` may not."""
    shorter, longer = sorted(("/" + _path(one), "/" + _path(other)), key=len)
    return longer.endswith(shorter)


def _path(path: str) -> str:
    return _without_query(path).replace("\\", "/").lower().removeprefix("./").lstrip("/")


def _file_name(path: str) -> str:
    return _path(path).rpartition("/")[2]
