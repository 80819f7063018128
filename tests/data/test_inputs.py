"""What a sample can be written as: images and records in every form, LLaVA JSON, people's own formats."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image

from cachekd.data import open_samples, sample_from_record
from cachekd.data.images import open_image
from cachekd.data.open import keys_hash
from cachekd.errors import BadSample, CachekdError
from tiny import (
    ANSWERED,
    noise_image,
    plain_error,
    png_bytes,
    write_llava_json,
    write_tar,
)

# ---- errors


@pytest.mark.parametrize("kind", [CachekdError, BadSample])
def test_errors_survive_pickling_with_all_their_fields(kind):
    error = kind("p", where="w", expected=[1, 2], found=3, fix="f")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.problem, copy.where, copy.expected, copy.found, copy.fix) == ("p", "w", [1, 2], 3, "f")
    assert str(copy) == str(error)


# ---- images


def encoded_image(form: str) -> bytes:
    stream = io.BytesIO()
    noise_image(1, (64, 48)).save(stream, format=form)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_broken_image_is_a_bad_sample_whatever_the_decoder_raises(form, data):
    whole = encoded_image(form)
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(content), where="w").mode == "RGB"  # some damage decodes
    except BadSample:
        event("refused")


def test_images_from_every_source_are_the_same(tmp_path: Path):
    content = png_bytes(noise_image(3))
    (tmp_path / "3.png").write_bytes(content)
    stored = [{"bytes": content, "path": None}, {"bytes": None, "path": "3.png"}, {"path": "3.png"}]
    sources = [content, "3.png", tmp_path / "3.png", Image.open(io.BytesIO(content)), *stored]
    pixels = {open_image(source, where="w", folder=tmp_path).tobytes() for source in sources}
    assert pixels == {noise_image(3).tobytes()}
    for source in (3, {}, [content]):
        with pytest.raises(BadSample, match="unknown kind"):
            open_image(source, where="w")
    for name in ("gone.png", "a\0b.png", "x" * 300, ".", "3.png/deeper.png"):
        with pytest.raises(BadSample, match=r"the image .* (is missing|cannot be read)"):
            open_image(name, where="w", folder=tmp_path)


def test_an_absurdly_large_image_is_a_bad_sample():
    content = bytearray(png_bytes(noise_image(0)))
    content[16:24] = (60000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(BadSample, match="DecompressionBombError"):
        open_image(bytes(content), where="w")


# ---- records


def test_the_accepted_forms_of_a_record_are_one_sample():
    image = noise_image(0)
    llava = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "re"}, {"type": "text", "text": "d"}]},
    ]
    arrow = [
        {
            "role": "user",
            "content": [
                {"type": "image", "text": None, "index": 0},
                {"type": "text", "text": "what?", "index": None},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "red", "index": None}]},
    ]
    columns = {"from": ["human", "gpt"], "value": ["<image>\nwhat?", "red"]}
    records = [
        {"image": image, "conversations": llava},
        {"images": [image], "messages": ANSWERED, "image": None, "conversations": None},
        {"images": image, "messages": parts},
        {"image": {"bytes": png_bytes(image), "path": None}, "messages": arrow},
        {"image": image, "conversations": columns},
        {"image": [image], "messages": [{"from": None, **turn} for turn in ANSWERED]},
    ]
    samples = [sample_from_record("k", record, origin="test") for record in records]
    assert {sample.content_hash for sample in samples} == {samples[0].content_hash}
    # As it was before there were other forms: caches hold this hash.
    assert samples[0].messages == (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    )


def test_the_content_hash_is_what_it_always_was():
    sample = sample_from_record(
        "k", {"image": Image.new("RGB", (2, 2), "red"), "messages": ANSWERED}, origin="test"
    )
    assert sample.content_hash.hex() == "589567b35b335ed530c703d134b52251"  # by the code of the first caches


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "inline.png"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text"},
        {"type": "text", "text": 3},
        {"type": "image", "text": "both"},
        "text",
        None,
    ],
)
def test_a_part_that_would_be_dropped_is_refused(part):
    messages = [{"role": "user", "content": [part]}, ANSWERED[1]]
    with pytest.raises(BadSample, match="a part of a turn cannot be read"):
        sample_from_record("k", {"image": noise_image(0), "messages": messages}, origin="test")


# ---- LLaVA JSON


def test_jsonl_lines_end_at_newlines_only_and_bad_ones_are_named(tmp_path: Path):
    noise_image(0).save(tmp_path / "0.png")
    record = {"id": "a", "image": "0.png", "messages": [ANSWERED[0], {"role": "assistant", "content": "x y"}]}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\r\n\n")
    assert open_samples(path)[0].messages[1]["content"][0]["text"] == "x y"
    path.write_text(json.dumps(record) + "\n{\n")
    with pytest.raises(CachekdError, match=f"line 2 of {path}"):
        open_samples(path)
    path.write_text(json.dumps(record) + "\n3\n")
    with pytest.raises(CachekdError, match="a list with int"):
        open_samples(path)


def test_a_folder_that_vanishes_is_not_a_bad_sample(tmp_path: Path):
    samples = open_samples(write_llava_json(tmp_path / "d", 2))
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(CachekdError, match="has gone") as caught:
        samples[0]
    assert str(tmp_path / "d") in plain_error(caught)


# ---- --limit, --shuffle-seed, --map


def test_limit_and_shuffle_keep_keys_and_samples_together(tmp_path: Path):
    path = write_llava_json(tmp_path, 9)
    whole = open_samples(path)
    shuffled = open_samples(path, shuffle_seed=3)
    order = np.random.default_rng(3).permutation(9)
    assert shuffled.keys == [whole.keys[i] for i in order]
    assert shuffled.keys != whole.keys
    assert sorted(shuffled.keys) == whole.keys
    part = open_samples(path, shuffle_seed=3, limit=4)
    assert part.keys == shuffled.keys[:4]
    assert [part[i].key for i in range(len(part))] == part.keys
    assert open_samples(path, limit=4).keys == whole.keys[:4]
    assert open_samples(path, limit=99).keys == whole.keys
    assert keys_hash(shuffled) != keys_hash(whole)
    for options in ({"limit": 0}, {"shuffle_seed": -1}):
        with pytest.raises(CachekdError, match=r"setting '(limit|shuffle_seed)'"):
            open_samples(path, **options)


MAP = """
import io
from PIL import Image

def turns(record):
    return [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record.pop("a")}]

def from_json(record):
    return {"image": record["file"], "messages": turns(record)}

def from_tar(record):
    image = Image.open(io.BytesIO(record["gif"]))
    question, answer = record["txt"].decode().split("|")
    return {"image": image, "messages": turns({"q": f"{record['__key__']}: {question}", "a": answer})}

def nothing(record):
    return None

number = 3
"""


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch):
    """Data in a format of somebody's own, its reader in the current directory."""
    name = f"my_format_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MAP)
    (tmp_path / "broken_module.py").write_text("import nowhere_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # restores sys.path
    noise_image(0).save(tmp_path / "0.png")
    (tmp_path / "d.json").write_text(
        json.dumps([{"id": 1, "file": "0.png", "q": "what?", "a": "red"}, {"id": 2, "q": "what?"}])
    )
    return name


def test_map_reads_peoples_own_json(mapped):
    samples = open_samples("d.json", map=f"{mapped}:from_json")
    expected = sample_from_record("1", {"image": noise_image(0), "messages": ANSWERED}, origin="test")
    for _ in range(2):  # the function takes things out of what it gets
        assert samples[0].content_hash == expected.content_hash
    with pytest.raises(BadSample, match="KeyError: 'file'") as caught:
        samples[1]
    assert f"{mapped}:from_json on sample '2' in d.json" in str(caught.value)
    with pytest.raises(BadSample, match="returned no record"):
        open_samples("d.json", map=f"{mapped}:nothing")[0]


def test_map_reads_peoples_own_tars(mapped, tmp_path: Path):
    gif = io.BytesIO()
    noise_image(0).save(gif, format="GIF")
    tar = write_tar(tmp_path / "d.tar", [("a.gif", gif.getvalue()), ("a.txt", b"what?|red"), ("b.txt", b"")])
    samples = open_samples(tar, map=f"{mapped}:from_tar")
    assert samples[0].questions[0][1] == "red"
    assert samples[0].questions[0][0][0]["content"][1]["text"] == "a: what?"
    with pytest.raises(BadSample, match="KeyError: 'gif'"):
        samples[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nocolon", "no module or no name"),
        (":f", "no module or no name"),
        ("nowhere_at_all:f", "cannot be imported"),
        ("broken_module:f", "No module named 'nowhere_at_all'"),
        ("{mapped}:missing", "cannot be imported"),
        ("{mapped}:number", "no function"),
    ],
)
def test_a_map_that_is_not_there_is_refused_at_once(mapped, name, message):
    with pytest.raises(CachekdError, match=message) as caught:
        open_samples("not even looked at", map=name.format(mapped=mapped))
    plain_error(caught)
