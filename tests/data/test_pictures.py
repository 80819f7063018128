"""Images as people have them: every mode that Pillow opens, against samples that are known."""

from __future__ import annotations

import base64
import io
import pickle
import re
import struct
from pathlib import Path
from urllib.parse import quote

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cachekd.data.images import open_image
from cachekd.errors import BadSample
from picture_files import exif, png, saved, tiff
from tiny import noise_image, png_bytes
from tiny_families import FAMILIES

RNG = np.random.default_rng(0)
SIZE = (6, 8)  # height, width
RGB = RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
ALPHA = RNG.choice([0, 1, 100, 128, 254, 255], SIZE).astype(np.uint8)
GREY = RNG.integers(0, 256, SIZE, dtype=np.uint8)
GREY_16 = RNG.integers(0, 65536, SIZE).astype(np.uint16)
GREY_16[0, :6] = [0, 65535, 128, 129, 257 * 100 + 128, 257 * 100 + 129]  # where rounding goes up, and not
INDEX = RNG.integers(0, 4, SIZE, dtype=np.uint8)
PALETTE = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30], [250, 250, 0]], np.uint8)


def read(source) -> NDArray[np.int64]:
    image = open_image(source, where="w")
    assert image.mode == "RGB"
    assert image.info.get("transparency") is None
    return np.asarray(image).astype(np.int64)


def on_white(colour, alpha) -> NDArray[np.float64]:
    """The reference: colour [h, w, 3] or [h, w], and alpha [h, w] of 255."""
    colour = np.atleast_3d(colour).astype(np.float64)
    share = np.asarray(alpha)[..., None] / 255
    return np.broadcast_to(colour * share + 255 * (1 - share), (*colour.shape[:2], 3))


def opaque(colour) -> NDArray[np.float64]:
    return on_white(colour, np.full(SIZE, 255))


def scaled(values, low, high) -> NDArray[np.float64]:
    """The reference for more than 8 bits: rounded to the nearest, grey."""
    exact = np.clip((np.asarray(values, np.float64) - low) / (high - low), 0, 1) * 255
    return opaque(np.floor(exact + 0.5))


def hidden(colour, where) -> NDArray[np.float64]:
    return on_white(colour, np.where(where, 0, 255))


def palette_image(transparent) -> bytes:
    image = Image.fromarray(INDEX)
    image.putpalette(PALETTE.tobytes())
    return saved(image, "PNG", transparency=transparent)


RGBA = np.dstack([RGB, ALPHA])
SOME_ALPHA = np.array([0, 255, 128, 7], np.uint8)
LIMITS = {"t340": ("d", -2.0), "t341": ("d", 6.0)}
FLOATS = RNG.normal(2, 4, SIZE).astype(np.float32)
FLOATS[0, :2] = [-2, 6]
LOW_2, LOW_4 = RNG.integers(0, 4, SIZE), RNG.integers(0, 16, SIZE)
PREMULTIPLIED = np.dstack([np.floor(GREY * (ALPHA / 255) + 0.5).astype(np.uint8), ALPHA])

# name -> (file, reference, by how much a level may be off: Pillow composes in integers)
FILES: dict[str, tuple[bytes, NDArray[np.float64], float]] = {
    "PNG RGBA": (png(RGBA, 8), on_white(RGB, ALPHA), 1),
    "PNG LA": (png(np.dstack([GREY, ALPHA]), 8), on_white(GREY, ALPHA), 1),
    "PNG palette": (palette_image(SOME_ALPHA.tobytes()), on_white(PALETTE[INDEX], SOME_ALPHA[INDEX]), 1),
    "PNG palette, one index": (palette_image(2), hidden(PALETTE[INDEX], INDEX == 2), 0),
    "PNG RGB, a transparent colour": (
        png(RGB, 8, transparent=RGB[1, 1]),
        hidden(RGB, (RGB[1, 1] == RGB).all(-1)),
        0,
    ),
    "PNG grey, a transparent one": (
        png(GREY, 8, transparent=[GREY[0, 0]]),
        hidden(GREY, GREY[0, 0] == GREY),
        0,
    ),
    "PNG grey of 4 bits": (png(LOW_4, 4, transparent=[9]), hidden(LOW_4 * 17, LOW_4 == 9), 0),
    "PNG grey of 2 bits": (png(LOW_2, 2, transparent=[2]), hidden(LOW_2 * 85, LOW_2 == 2), 0),
    "PNG of 1 bit": (png(GREY > 99, 1), opaque((GREY > 99) * 255), 0),
    "PNG of 1 bit, transparent": (png(GREY > 99, 1, transparent=[0]), opaque(GREY * 0 + 255), 0),
    "PNG grey of 16 bits": (png(GREY_16, 16), scaled(GREY_16, 0, 65535), 0),
    "PNG grey of 16 bits, a transparent one": (
        png(GREY_16, 16, transparent=[129]),
        np.where((GREY_16 == 129)[..., None], 255, scaled(GREY_16, 0, 65535)),
        0,
    ),
    "PNG RGB of 16 bits": (png(RGB.astype(int) * 257, 16), opaque(RGB), 0),
    "PNG RGBA of 16 bits": (png(RGBA.astype(int) * 257, 16), on_white(RGB, ALPHA), 1),
    "PGM of 16 bits": (b"P5 8 6 65535\n" + GREY_16.astype(">u2").tobytes(), scaled(GREY_16, 0, 65535), 0),
    "JPEG 2000 of 16 bits": (saved(Image.fromarray(GREY_16), "JPEG2000"), scaled(GREY_16, 0, 65535), 0),
    "TIFF of 16 bits": (tiff(GREY_16), scaled(GREY_16, 0, 65535), 0),
    "TIFF of 16 bits, big-endian": (tiff(GREY_16, big=True), scaled(GREY_16, 0, 65535), 0),
    "TIFF of 16 bits, white is zero": (tiff(GREY_16, photometric=0), 255 - scaled(GREY_16, 0, 65535), 0),
    "TIFF of 8 bits, white is zero": (tiff(GREY, photometric=0), 255 - opaque(GREY), 0),
    "TIFF float": (tiff(FLOATS, t339=("H", 3), **LIMITS), scaled(FLOATS, -2, 6), 0),
    "TIFF float, white is zero": (
        tiff(FLOATS, photometric=0, t339=("H", 3), **LIMITS),
        np.floor(255 - np.clip((opaque(FLOATS) + 2) / 8, 0, 1) * 255 + 0.5),
        0,
    ),
    "TIFF of 32 bits": (
        tiff(GREY_16.astype(np.uint32) * 60000, t340=("I", 0), t341=("I", 3 * 10**9)),
        scaled(GREY_16 * 60000.0, 0, 3e9),
        0,
    ),
    "TIFF of 32 bits, signed": (
        tiff(GREY_16.astype(np.int32) - 9000, t339=("H", 2), t340=("i", -9000), t341=("i", 50000)),
        scaled(GREY_16 - 9000.0, -9000, 50000),
        0,
    ),
    "TIFF of 16 bits, signed": (
        tiff(GREY.astype(np.int16) - 128, t339=("H", 2), t340=("i", -128), t341=("i", 127)),
        opaque(GREY),
        0,
    ),
    "TIFF RGBA": (tiff(RGBA, photometric=2, t338=("H", 2)), on_white(RGB, ALPHA), 1),
    "TIFF LA, premultiplied": (
        tiff(PREMULTIPLIED, t338=("H", 1)),
        opaque(PREMULTIPLIED[..., 0] + 255.0 - ALPHA),
        1.5,
    ),
    "TIFF palette with alpha": (
        tiff(
            np.dstack([INDEX, ALPHA]),
            photometric=3,
            t338=("H", 2),
            t320=("H", *(np.pad(PALETTE, ((0, 252), (0, 0))).T.reshape(-1).astype(int) * 257).tolist()),
        ),
        on_white(PALETTE[INDEX], ALPHA),
        1,
    ),
    "TIFF CMYK": (
        tiff(np.dstack([RGB, GREY]), photometric=5),
        (255.0 - RGB) * (255.0 - GREY[..., None]) / 255,
        1,
    ),
    "TIFF YCbCr": (
        saved(Image.fromarray(RGB).convert("YCbCr"), "TIFF", compression=None),
        opaque(RGB),
        3,
    ),
    "GIF": (
        saved(Image.open(io.BytesIO(palette_image(1))), "GIF"),
        hidden(PALETTE[INDEX], INDEX == 1),
        0,
    ),
    "WebP RGBA": (saved(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), on_white(RGB, ALPHA), 1),
}
if int(PIL.__version__.partition(".")[0]) < 13:  # it cannot read these: their samples are bad ones
    FILES = {
        name: file for name, file in FILES.items() if name not in ("TIFF LA, premultiplied", "TIFF YCbCr")
    }


@pytest.mark.parametrize("name", FILES)
def test_the_pixels_of_a_file_are_those_of_its_samples(name):
    content, wanted, off = FILES[name]
    assert np.abs(read(content) - wanted).max() <= off
    assert wanted.std() > 1 or "transparent" in name  # a reference that says something


def test_12_bits_reach_to_4095():
    """TIFF packs two samples into three bytes."""
    low = np.array([[0, 4095, 2048, 100], [1, 15, 16, 4000]])
    pairs = low.reshape(-1, 2).tolist()
    strip = b"".join(int(f"{a:03x}{b:03x}", 16).to_bytes(3, "big") for a, b in pairs)
    rows = np.frombuffer(strip, np.uint8).reshape(2, 6)
    content = tiff(rows, bits=12, t256=("I", 4))
    with Image.open(io.BytesIO(content)) as image:
        assert (image.mode, np.asarray(image).tolist()) == ("I;16", low.tolist())
    assert read(content)[..., 0].tolist() == np.floor(low * 255 / 4095 + 0.5).tolist()


@pytest.mark.parametrize("transform", [0, 2])
def test_adobes_inverted_cmyk_and_ycck_are_the_colours_that_were_meant(transform):
    inks = np.empty((16, 16, 4), np.uint8)
    inks[:] = [30, 200, 90, 20]
    wanted = (255 - inks[..., :3].astype(float)) * (255 - 20) / 255
    planes = inks
    if transform == 2:  # libjpeg makes of YCC what is 255 - stored CMY, so CMY itself is what YCC is made of
        ycc = np.asarray(Image.fromarray(inks[..., :3]).convert("YCbCr"))
        planes = np.dstack([255 - ycc, inks[..., 3]])  # Pillow inverts what it writes
    content = saved(Image.frombytes("CMYK", (16, 16), planes.tobytes()), "JPEG", quality=100, subsampling=0)
    marker = content.index(b"Adobe")
    assert content[marker + 11] == 0  # the transform that Pillow writes
    content = content[: marker + 11] + bytes([transform]) + content[marker + 12 :]
    assert np.abs(read(content) - wanted).max() <= 3


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_read(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    lossless = {"lossless": True} if form == "WEBP" else {}
    content = saved(frames[0], form, save_all=True, append_images=frames[1:], **lossless)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 3
    assert np.unique(read(content).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_of_an_image_in_memory_the_mode_says_what_its_numbers_are():
    """Modes of which there are no files, or of which a file's bytes were decoded by somebody else."""
    native = "<u2" if struct.pack("=H", 1)[0] else ">u2"
    for mode, kind in {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": native}.items():
        image = Image.frombytes(mode, SIZE[::-1], GREY_16.astype(kind).tobytes())
        assert np.array_equal(read(image), scaled(GREY_16, 0, 65535)), mode
    premultiplied = np.floor(RGB * (ALPHA[..., None] / 255) + 0.5).astype(np.uint8)
    image = Image.frombytes("RGBa", SIZE[::-1], np.dstack([premultiplied, ALPHA]).tobytes())
    assert np.abs(read(image) - (premultiplied + 255.0 - ALPHA[..., None])).max() <= 1.5
    image = Image.fromarray(INDEX)
    image.putpalette(np.c_[PALETTE, SOME_ALPHA].tobytes(), "RGBA")
    assert np.abs(read(image) - on_white(PALETTE[INDEX], SOME_ALPHA[INDEX])).max() <= 1
    image = Image.frombytes("RGBX", SIZE[::-1], RGBA.tobytes())
    assert np.array_equal(read(image), RGB)
    for colour, hsv, lab in (
        ("red", (0, 255, 255), (138, 209, 198)),
        ("white", (0, 0, 255), (255, 128, 128)),
    ):
        wanted = np.asarray(Image.new("RGB", (1, 1), colour)).astype(int)
        assert np.abs(read(Image.new("HSV", (1, 1), hsv)) - wanted).max() == 0
        stored = np.array([[(lab[0], lab[1] ^ 128, lab[2] ^ 128)]], np.uint8)  # a and b are signed in a file
        for source in (Image.frombytes("LAB", (1, 1), stored.tobytes()), tiff(stored, photometric=8)):
            assert np.abs(read(source) - wanted).max() <= 6  # D50, through a profile


def test_reading_does_not_change_the_callers_image():
    image = Image.open(io.BytesIO(FILES["PNG grey of 4 bits"][0]))
    first, info = read(image), dict(image.info)
    assert np.array_equal(first, FILES["PNG grey of 4 bits"][1])
    assert info["transparency"] == 9
    assert image.mode == "L"


FITS = b"".join(
    line.ljust(80).encode()
    for line in ("SIMPLE  =   T", "BITPIX  =   16", "NAXIS   =   2", "NAXIS1  =   8", "NAXIS2  =   6", "END")
).ljust(2880) + bytes(2880)
NAN = np.where(FLOATS > 0, FLOATS, np.nan)
UNKNOWN = {
    "TIFF float": tiff(FLOATS, t339=("H", 3)),
    "TIFF float, no range": tiff(FLOATS, t339=("H", 3), t340=("d", 1.0), t341=("d", 1.0)),
    "TIFF of 32 bits": tiff(GREY_16.astype(np.uint32)),
    "TIFF of 16 bits, signed": tiff(GREY.astype(np.int16), t339=("H", 2)),
    "TIFF of 8 bits, signed": tiff(GREY.astype(np.int8), t339=("H", 2)),
    "TIFF, not a number": tiff(NAN, t339=("H", 3), **LIMITS),
    "float": Image.fromarray(FLOATS),
    "int": Image.fromarray(GREY.astype(np.int32)),
    "FITS": FITS,
    "PNG RGB of 16 bits, a transparent colour": png(RGB.astype(int) * 257, 16, transparent=[9, 9, 9]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_numbers_that_could_mean_anything_are_refused_by_name(name):
    with pytest.raises(BadSample, match=r"the image 'images\[1\]' cannot be read") as caught:
        open_image(UNKNOWN[name], where="w", name="images[1]")
    assert re.search("black and white|signed|finite|16 bits per channel", str(caught.value.found))
    assert "8 bits" in str(caught.value.fix)


# ---- as the families' own processors read them

CONVERTED = {
    **{name: FILES[name][0] for name in FILES if re.search("RGBA|LA$|palette|YCbCr|CMYK|GIF|1 bit$", name)},
    "PNG RGB, a transparent colour": FILES["PNG RGB, a transparent colour"][0],
    "PNG grey, a transparent one": FILES["PNG grey, a transparent one"][0],
    "PNG grey": png(GREY, 8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_processors_make_the_same_of_the_raw_image(family):
    """By the class's own default each converts; none turns, or reads more than 8 bits of grey."""
    images = FAMILIES[family].processor().image_processor
    assert images.do_convert_rgb
    for name, content in CONVERTED.items():
        raw = Image.open(io.BytesIO(content))
        ours = images(images=[[open_image(content, where="w")]], return_tensors="pt")
        theirs = images(images=[[raw]], return_tensors="pt")
        assert theirs.keys() == ours.keys()
        for key in ours:
            assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])), (name, key)


# ---- orientation

TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_is_turned_by_its_orientation_alone(orientation, odd):
    tags = exif(orientation, odd=odd)
    wanted = TURNED[orientation](RGB)
    for form, settings in {"PNG": {}, "WEBP": {"lossless": True}}.items():
        content = saved(Image.fromarray(RGB), form, exif=tags, **settings)
        assert np.array_equal(read(content), wanted), form
        if odd and orientation != 1:  # what Pillow does to turn: it writes all tags back
            with pytest.raises(struct.error):
                ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(read(tiff(RGB, photometric=2, t274=("H", orientation))), wanted)
    jpeg = saved(Image.fromarray(RGB), "JPEG", exif=tags)
    assert np.array_equal(read(jpeg), TURNED[orientation](read(saved(Image.fromarray(RGB), "JPEG"))))


def test_transparency_is_turned_too():
    content = saved(Image.fromarray(RGBA), "PNG", exif=exif(6))
    assert np.abs(read(content) - np.rot90(on_white(RGB, ALPHA), -1)).max() <= 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "tags",
    [
        exif(9),
        exif(0),
        b"Exif\0\0XX*\0\x08\0\0\0",
        b"hello",
        b"Exif\0\0II*\0\x08\0\0\0\x05\0ab",
        exif(6, kind=99),
    ],
)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_an_orientation_that_cannot_be_read_is_none(form, tags):
    settings = {"lossless": True} if form == "WEBP" else {}
    image = Image.fromarray(RGB)
    assert np.array_equal(
        read(saved(image, form, exif=tags, **settings)), read(saved(image, form, **settings))
    )


# ---- where an image is

CONTENT = png_bytes(noise_image(3))
BASE64 = base64.b64encode(CONTENT).decode()


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:;BASE64,{BASE64.rstrip('=')}",
        f"data:image/png;name=a.png;base64,{quote(BASE64, safe='')}",
        "data:image/png;base64," + "\r\n".join(re.findall(".{1,76}", BASE64)),
        f"data:image/png,{quote(CONTENT)}",
    ],
)
def test_a_data_uri_is_the_image_that_it_holds(uri):
    assert np.array_equal(read(uri), np.asarray(noise_image(3)))
    assert np.array_equal(read({"bytes": None, "path": uri}), np.asarray(noise_image(3)))


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        (f"data:image/png;base64,{BASE64[:-40]}%%", "base64|padd"),
        (f"data:image/png;base64,{BASE64}!", "padding"),
        ("data:image/png;base64", "no comma"),
        ("data:text/plain,hello", "not a picture"),
        ("data:,", "not a picture"),
    ],
)
def test_a_broken_data_uri_is_a_bad_sample(uri, found):
    with pytest.raises(BadSample, match=r"the image 'image' cannot be read") as caught:
        open_image(uri, where="w", name="image")
    assert re.search(found, str(caught.value.found), re.IGNORECASE)


@pytest.mark.parametrize("scheme", ["http", "HTTPS", "s3", "hf", "gs", "ftp", "zip"])
def test_an_address_is_refused_with_what_to_do(scheme):
    with pytest.raises(BadSample, match=f"'{scheme}://a.b/c.png' is an address") as caught:
        open_image(f"{scheme}://a.b/c.png", where="w")
    assert "download the images" in str(caught.value.fix)


def test_a_file_address_is_its_path(tmp_path: Path):
    (tmp_path / "a b#1.png").write_bytes(CONTENT)
    pixels = np.asarray(noise_image(3))
    assert np.array_equal(read((tmp_path / "a b#1.png").as_uri()), pixels)
    assert np.array_equal(read(f"file://localhost{tmp_path}/a b#1.png"), pixels)
    with pytest.raises(BadSample, match="is an address"):
        open_image("file://server/a.png", where="w")
    with pytest.raises(BadSample, match=r"'file:///gone\.png' is missing") as caught:
        open_image("file:///gone.png", where="w")
    assert caught.value.expected == "an image at /gone.png"


# ---- what messages say


def test_a_broken_image_is_named(tmp_path: Path):
    (tmp_path / "b.png").write_bytes(CONTENT[:200])
    (tmp_path / "t.png").write_bytes(b"<html>")
    for source, name, problem in [
        ("b.png", None, "the image 'b.png' cannot be read"),
        (Path("t.png"), "images[1]", "the image 't.png' cannot be read"),
        ({"bytes": b"x", "path": "c/d.png"}, "images[1]", "the image 'c/d.png' cannot be read"),
        ({"bytes": b"x", "path": None}, "images[1]", "the image 'images[1]' cannot be read"),
        (b"x", "images[1]", "the image 'images[1]' cannot be read"),
        (b"x", None, "an image cannot be read"),
        (3, "images[1]", "the image 'images[1]' is of an unknown kind"),
    ]:
        with pytest.raises(BadSample) as caught:
            open_image(source, where="w", folder=tmp_path, name=name)
        assert caught.value.problem == problem
    with pytest.raises(BadSample) as caught:
        open_image(b"<html>", where="w")
    assert caught.value.found == "not a picture in any format that Pillow knows"


@pytest.mark.parametrize(
    "source",
    [
        BASE64 * 500,  # meant as an image, read as a path
        f"data:image/png;base64,{BASE64 * 500}!",
        "https://a.b/" + "c" * 100_000,
        "d/" * 50_000,
        {"bytes": b"x", "path": "e" * 100_000},
        {"bytes": {"f": "g" * 100_000}},
    ],
)
def test_a_message_never_carries_the_data(source):
    with pytest.raises(BadSample) as caught:
        open_image(source, where=f"sample {'k' * 100_000} in data.json", name="image")
    error = caught.value
    for said in (error.problem, str(error.where), str(error.expected or ""), str(error.found or "")):
        assert len(said) <= 200
    assert str(error.where).endswith("in data.json")
    assert len(str(error)) < 1000
    if source == BASE64 * 500:
        assert "data:image/png;base64," in str(error.fix)


@given(
    text=st.text(st.sampled_from("ab >") | st.characters(), max_size=300)
    | st.lists(st.sampled_from([" at 0x7f", ">", "<a", " at 0xAB", "b" * 90]), max_size=9).map("".join)
)
def test_what_a_bad_sample_says_is_short_without_addresses_and_survives_pickling(text):
    error = BadSample(text, where=text, expected=text, found=text, fix="f")
    assert not re.search(" at 0x[0-9a-fA-F]+>", str(error))
    assert max(len(said) for said in (error.problem, error.where, error.expected, error.found)) <= 200
    copy = pickle.loads(pickle.dumps(error))
    fields = ("problem", "where", "expected", "found", "fix")
    assert [getattr(copy, name) for name in fields] == [getattr(error, name) for name in fields]
    assert str(copy) == str(error)


def test_objects_are_told_without_their_place_in_memory():
    found = io.BytesIO()
    assert " at 0x" in str(found)
    assert BadSample("p", found=found).found == "<_io.BytesIO object>"
    assert BadSample("p", found=f"KeyError: {[found]}").found == "KeyError: [<_io.BytesIO object>]"
