"""A picture is taken or refused by its name: no sample becomes text because a field has another one."""

from __future__ import annotations

import base64
import io
import timeit
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.data import Sample, open_samples, sample_from_record
from cachekd.data.image_fields import pictures_of, refuse_untaken
from cachekd.data.preview import preview_of_record
from cachekd.data.sample import Preview
from cachekd.errors import BadSample
from tiny import conversation, noise_image, png_bytes

TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "see a.png"}]
PNG = png_bytes(noise_image(0))
STRUCT = {"bytes": PNG, "path": None}
BASE64 = base64.b64encode(PNG).decode()


def encoded(form: str) -> bytes:
    stream = io.BytesIO()
    noise_image(1).save(stream, format=form)
    return stream.getvalue()


def read(fields: dict[str, Any], **options: Any) -> Sample:
    return sample_from_record("k", {"conversations": TURNS, **fields}, origin="test", **options)


def refused(fields: dict[str, Any], found: str | None = None) -> str:
    with pytest.raises(BadSample, match="an image under another name") as caught:
        read(fields)
    if found is not None:
        assert caught.value.found == found
    assert len(str(caught.value)) < 800
    return str(caught.value)


# What data sets have, and the name by which it is refused.
LOST: list[tuple[dict[str, Any], str]] = [
    ({"picture": STRUCT}, "picture"),
    ({"picture": {"bytes": None, "path": "0.png"}}, "picture"),
    ({"jpg": PNG}, "jpg"),
    ({"jpg": bytearray(PNG)}, "jpg"),
    ({"photo": noise_image(0)}, "photo"),
    ({"image_paths": ["a/0.png", "a/1.png"]}, "image_paths"),
    ({"img": {"path": "0.JPG"}}, "img"),
    ({"img": {"file": "0.jpg", "size": [3, 4]}}, "img.file"),
    ({"image_url": "https://x.org/a.png?w=3"}, "image_url"),
    ({"link": "a.webp#page"}, "link"),
    ({"picture": f"data:image/png;base64,{BASE64}"}, "picture"),
    ({"image_base64_str": [BASE64]}, "image_base64_str"),
    ({"meta": {"views": [{"photo": PNG}]}}, "meta.views.photo"),
    ({"photo": "Screen Shot at 10.00.png"}, "photo"),
    ({"photo": Path("a.png")}, "photo"),
    ({"id": "0001.jpg"}, "id"),
    ({"image": "", "images": None, "img": "a.png"}, "img"),
]


@pytest.mark.parametrize(("fields", "name"), LOST)
def test_a_picture_under_another_name_is_refused_by_it(fields, name):
    text = refused(fields, name)
    assert f"--image-field {name} to take it" in text
    assert BASE64[:40] not in text


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000"])
def test_bytes_are_known_by_their_magic(form):
    refused({"blob": encoded(form)}, "blob")


@pytest.mark.parametrize(
    "fields",
    [
        {"note": f"{'a long text ' * 20} that ends in a.png"},
        {"note": "two lines\n" * 30 + "a.png"},
        {"note": "x" * 500 + ".png"},
        {"note": "a.png is here", "link": "https://x.org/a.png.html", "page": "a.pngx"},
        {"audio_codes": b"RIFF1234WAVE", "clip": b"\0\0\0\x20ftypisom", "text": b"BMW is a car", "z": b""},
        {"size": {"bytes": 1234, "path": "somewhere"}, "boxes": [[1, 2.5], [3, 4]], "flags": [True, None]},
        {"system": "answer with a.png", "tools": [{"name": "a.png"}]},
        {"messages": [{"role": "user", "content": "another a.png"}]},
        {"code": "/9j/", "hash": "iVBORw0KGgo"},
        {"images": [], "image": None},
    ],
)
def test_what_is_no_picture_is_left_alone(fields):
    assert read(fields).images == ()


def test_a_turns_own_picture_is_refused_though_its_text_is_not_looked_at():
    for turn in ({"photo": PNG}, {"shown": {"file": "a.png"}}):
        turns = [{**TURNS[0], **turn}, TURNS[1]]
        text = refused({"conversations": turns})
        assert "found: conversations." in text
        assert "<image> where each stands" in text
        assert "--image-field" not in text
    with pytest.raises(BadSample, match="images within turns cannot be taken"):
        read({"conversations": turns}, image_fields=("conversations.shown.file",))


# ---- beside a picture that is taken


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"mask": PNG}, "mask"),
        ({"mask": STRUCT}, "mask"),
        ({"mask": noise_image(1)}, "mask"),
        ({"depth": "b.png"}, "depth"),
        ({"second": {"path": "b.png"}}, "second"),
        ({"image2": f"data:image/png;base64,{BASE64}"}, "image2"),
        ({"images": ["0.png", "1.png"]}, "images"),
    ],
)
def test_another_picture_beside_one_is_refused(tmp_path, fields, found):
    noise_image(0).save(tmp_path / "0.png")
    with pytest.raises(BadSample, match="another name") as caught:
        read({"image": "0.png", **fields}, folder=tmp_path)
    assert caught.value.found == found
    assert caught.value.fix == (
        f"--image-field image to take this alone, and --image-field {found} to take that too"
    )
    assert len(read({"image": "0.png", **fields}, folder=tmp_path, image_fields=("image",)).images) == 1


def test_the_metadata_of_a_picture_are_left_alone(tmp_path):
    noise_image(0).save(tmp_path / "0.png")
    fields = {"coco_url": "http://x.org/5.jpg", "file_name": "train/0.png", "id": "0.PNG", "images": None}
    assert len(read({"image": "0.png", **fields}, folder=tmp_path).images) == 1
    # A picture that is held itself has no name, so that one elsewhere may be its; two are not.
    for image in (PNG, STRUCT, noise_image(0)):
        assert len(read({"image": image, "file_name": "5.jpg", "path": "a/5.jpg"}).images) == 1
        refused({"image": image, "file_name": "5.jpg", "depth": "6.png"})
    named = {"bytes": PNG, "path": "5.jpg"}
    assert len(read({"image": named, "file_name": "5.jpg"}).images) == 1
    refused({"image": named, "file_name": "6.jpg"}, "file_name")


@pytest.mark.parametrize(
    "column", [{"picture": [STRUCT]}, {"jpg": [PNG]}, {"image_paths": [["a.png", "b.png"]]}]
)
def test_a_tables_column_is_refused_when_its_row_is_read(tmp_path, column):
    table = datasets.Dataset.from_dict({"conversations": [TURNS], **column})
    table.to_parquet(tmp_path / "d.parquet")
    with pytest.raises(BadSample, match="another name") as caught:
        open_samples(tmp_path / "d.parquet")[0]
    assert caught.value.found == next(iter(column))
    assert "row 0" in str(caught.value.where)


# ---- fields that are named


def test_named_fields_are_taken_in_their_order():
    left, right, third = (png_bytes(noise_image(seed)) for seed in range(3))
    record = {"cameras": {"left": left, "right": [right]}, "views": [{"at": third}, {"at": None}, {}]}
    record |= {"a.b": {"c": left}, "image": third, "none": None}
    for names, expected in [
        (("cameras.right", "cameras.left"), [1, 0]),
        (("views.at", "image", "none", "nowhere.at.all"), [2, 2]),
        (("a.b.c",), [0]),
    ]:
        sample = read(record, image_fields=names)
        assert [image.tobytes() for image in sample.images] == [noise_image(i).tobytes() for i in expected]
        assert preview_of_record(record, names).images == len(expected)


def test_base64_is_decoded():
    for form in ("PNG", "JPEG", "GIF", "WEBP"):
        content = encoded(form)
        text = base64.b64encode(content).decode()
        expected = read({"image": content}).content_hash
        assert read({"image": text}).content_hash == expected
        assert read({"other": text}, image_fields=["other"]).content_hash == expected


def test_pictures_have_names():
    record = {"images": ["a.png", "b.png"], "view": {"left": "c.png"}}
    assert [picture.name for picture in pictures_of(record)] == ["images[0]", "images[1]"]
    assert [picture.name for picture in pictures_of(record, ["view.left"])] == ["view.left"]


def test_an_empty_field_does_not_hide_the_other():
    for nothing in ("", [], None):
        assert len(read({"image": nothing, "images": [PNG]}).images) == 1
        assert preview_of_record({"image": nothing, "images": [PNG], "conversations": TURNS}).images == 1


KEYS = st.sampled_from(["a", "b", "source", "x.y", "caption"])
PLAIN = st.one_of(st.none(), st.integers(), st.floats(), st.sampled_from(["", "text", "a.pdf", b"", b"RIFF"]))
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)
)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    noise=st.dictionaries(KEYS, VALUES, max_size=3),
    path=st.lists(st.sampled_from(["left", "right", "in list", "dot.ted"]), max_size=4),
    picture=st.sampled_from([PNG, STRUCT, noise_image(0)]),
)
def test_a_picture_anywhere_is_refused_by_a_name_that_takes_it(data, noise, path, picture):
    assert read(noise).images == ()
    value: Any = picture
    for key in reversed(path):
        beside = data.draw(st.dictionaries(KEYS, PLAIN, max_size=2))
        value = {**beside, key: [value] if key == "in list" and not isinstance(value, list) else value}
    fields = {**noise, "top": value}
    with pytest.raises(BadSample, match="another name") as caught:
        read(fields)
    name = str(caught.value.found)
    assert f"--image-field {name} to take it" in str(caught.value)
    taken = read(fields, image_fields=(name,))
    assert [image.tobytes() for image in taken.images] == [noise_image(0).tobytes()]


# ---- outlines, and what it costs


@settings(max_examples=100, deadline=None)
@given(
    record=st.dictionaries(
        st.sampled_from(["image", "images", "conversations", "messages", "system", "tools"]), VALUES
    )
)
def test_an_outline_is_made_of_anything(record):
    assert preview_of_record(record, ("a.b", "images")).images >= 0
    assert all(isinstance(text, str) for text in preview_of_record(record).texts)


def test_an_outline_of_lists_in_lists_is_empty():
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    record = {"conversations": [{"from": "gpt", "value": deep}], "tools": deep}
    assert preview_of_record(record) == Preview([], 0)
    refused({"deep": {"list": deep}, "img": PNG}, "img")


def test_looking_for_pictures_costs_next_to_nothing():
    """A mix has 665,000 records."""
    record = {"id": "1", "image": "coco/1.jpg", "source": "x", "conversations": conversation(1, turns=5)}
    pictures = pictures_of(record)
    seconds = min(timeit.repeat(lambda: refuse_untaken(record, pictures, "here"), number=500, repeat=5)) / 500
    assert seconds < 200e-6


@pytest.mark.parametrize(
    "value",
    [
        *(f"a/0{suffix}" for suffix in (".jfif", ".jpe", ".ico", ".ppm", ".svg", ".heif", ".JXL", ".tga")),
        " 0.png\n",
        "https://x.org/get?file=0.png",
    ],
)
def test_pictures_of_rarer_kinds_make_no_texts(value):
    with pytest.raises(BadSample, match="image under another name"):
        read({"thumb": value})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"video_path": "v/1.mp4"}, "video_path"),
        ({"clip": ["x.AVI"]}, "clip"),
        ({"media": {"type": "video", "url": "https://x.org/x.webm?t=3"}}, "media.url"),
        ({"audio_file": "x.wav"}, "audio_file"),
    ],
)
def test_video_and_audio_under_any_name_make_no_texts(fields, name):
    with pytest.raises(BadSample, match="video or audio") as caught:
        read(fields)
    assert str(caught.value.found).startswith(f"{name}: ")
    assert len(read({"image": PNG, **fields}).images) == 1  # a frame, perhaps, and where it is from


def test_fields_that_hold_nothing_make_no_text_of_what_has_pictures():
    """A record of text alone is text; one whose picture is elsewhere is not."""
    assert read({"none": None, "source": "a book"}, image_fields=["none"]).images == ()
    with pytest.raises(BadSample, match="image under another name") as caught:
        read({"none": None, "image": PNG}, image_fields=["none"])
    assert str(caught.value.fix).startswith("--image-field none --image-field image")
    for nothing in ({"bytes": None, "path": None}, [], ""):  # as tables fill it in
        assert read({"image": nothing}).images == ()


def test_a_file_of_the_same_name_in_another_folder_is_another_picture(tmp_path, monkeypatch):
    """Stereo and depth sets are named so; the end of a path is the same file."""
    monkeypatch.chdir(tmp_path)
    Path("left").mkdir()
    noise_image(0).save("left/1.png")
    for other in ("right/1.png", {"path": "depth/1.png"}, ["a/left/2.png"]):
        refused({"image": "left/1.png", "other": other}, "other")
    for same in ("1.png", "left/1.png", "./left/1.png", "data/left/1.PNG", "https://x.org/right/1.png"):
        assert len(read({"image": "left/1.png", "other": same}).images) == 1
