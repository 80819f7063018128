"""Caches of images that are read differently by now, and what a dump says of images that it left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from typer.testing import CliRunner

from cachekd.cache import LogitCache, Manifest, overview
from cachekd.cache.derive import merge_caches
from cachekd.cache.sealed import is_canonical
from cachekd.check.match import check_sample
from cachekd.config import DataOptions, TrainConfig
from cachekd.data import SampleEncoder, images, open_samples
from cachekd.data.images import READING
from cachekd.dump.recheck import recheck
from cachekd.dump.run import load_teacher, teacher_files
from cachekd.errors import CachekdError
from cachekd.models import fingerprint, load_processor
from cachekd.models.fingerprint import image_reading
from cachekd.models.processors import TextProcessor
from cachekd.train import train
from cachekd_cli.main import app
from caches import copied, dump_cache, files_of, flip, reseal
from tiny import (
    conversation,
    noise_image,
    png_bytes,
    tar_members,
    tiny_processor,
    write_llava_json,
    write_tar,
)

TRANSPARENT = "s002"


def as_it_was(image: Image.Image) -> Image.Image:
    """Reading 1."""
    return ImageOps.exif_transpose(image).convert("RGB")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples, two shards; one of the first has a picture with transparency."""
    members = tar_members(12)
    pixels = np.dstack([np.asarray(noise_image(2)), np.arange(1024).reshape(32, 32) % 256]).astype(np.uint8)
    members[4] = (members[4][0], png_bytes(Image.fromarray(pixels)))
    assert members[4][0] == f"{TRANSPARENT}.png"
    folder = tmp_path_factory.mktemp("mixed")
    write_tar(folder / "0.tar", members)
    return folder


@pytest.fixture(scope="module")
def old(tmp_path_factory, teacher_path, mixed) -> Path:
    """A cache of reading 1, had that been recorded."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(images, "upright_rgb", as_it_was)
        patched.setattr(fingerprint, "READING", 1)
        return dump_cache(tmp_path_factory.mktemp("caches") / "old", teacher_path, mixed, tail="none")


@pytest.fixture(scope="module")
def unrecorded(tmp_path_factory, old) -> Path:
    """The same as caches have it that were made before readings were recorded."""
    out = copied(old, tmp_path_factory.mktemp("caches") / "unrecorded")
    reseal(out / "manifest.json", lambda values: values["fingerprints"].pop("image_reading"))
    shutil.rmtree(out / "dump")
    return out


@pytest.fixture(params=["old", "unrecorded"])
def stale(request, tmp_path) -> Path:
    return copied(request.getfixturevalue(request.param), tmp_path / "stale")


def test_only_the_images_that_are_read_differently_are_refused(stale, mixed, student_path):
    cache, samples = LogitCache(stale), open_samples(str(mixed))
    encoder, refused = SampleEncoder(load_processor(str(student_path))), []
    for index, key in enumerate(samples.keys):
        try:
            check_sample(cache, encoder(samples[index]), cache[key])
        except CachekdError as error:
            refused.append(key)
            told = str(error)
    assert refused == [TRANSPARENT]
    theirs = cache.manifest.fingerprints.image_reading or "not recorded"
    assert f"(version {READING}, the cache's is {theirs})" in told
    assert f"sample {TRANSPARENT!r}" in told
    assert "run `cachekd dump` again" in told


def test_of_a_cache_of_todays_reading_nothing_else_than_changed_data_is_suspected(
    cache_path, data_path, mixed, student_path
):
    cache = LogitCache(cache_path)
    assert cache.manifest.fingerprints.image_reading == READING
    sample = open_samples(str(mixed))[2]
    with pytest.raises(CachekdError, match="the data changed since the dump: run") as caught:
        check_sample(cache, SampleEncoder(load_processor(str(student_path)))(sample), cache[TRANSPARENT])
    assert "version" not in str(caught.value)
    assert len(open_samples(str(data_path))) == len(cache)


def test_training_stops_at_such_an_image_and_not_without_one(unrecorded, mixed, student_path, tmp_path):
    settings = {"student": str(student_path), "cache": unrecorded, "lambda_vsd": 0}
    members = [member for member in tar_members(12) if not member[0].startswith(TRANSPARENT)]
    plain = str(write_tar(tmp_path / "plain.tar", members))
    config = TrainConfig(**settings, data=plain, out=tmp_path / "a", training={"max_steps": 1})
    assert train(config).steps == 1
    epoch = {"max_steps": 12}  # of one sample or more
    with pytest.raises(CachekdError, match="as they are now, transparent or 16-bit ones"):
        train(TrainConfig(**settings, data=str(mixed), out=tmp_path / "b", training=epoch))


def test_a_dump_is_not_gone_on_with_under_another_reading(old, mixed, teacher_path, tmp_path):
    begun = copied(old, tmp_path / "begun")
    for name in ("manifest.json", "shards/00001.zarr.zip", "dump/00001.json"):
        (begun / name).unlink()
    with pytest.raises(CachekdError, match="different reading of images") as caught:
        dump_cache(begun, teacher_path, mixed, tail="none")
    assert f"reading of images {READING}" in str(caught.value.found)


def test_the_teacher_is_asked_again_and_nothing_is_deleted_that_it_would_read_otherwise(
    stale, mixed, teacher_path
):
    cache, samples = LogitCache(stale), open_samples(str(mixed))
    files = teacher_files(str(teacher_path), DataOptions.of(mixed))
    teacher = load_teacher(files, samples, "stop", cache.manifest.codec, "float32")
    found = recheck(cache, teacher, samples, 12)
    assert [mismatch.key for mismatch in found.mismatches] == [TRANSPARENT]
    assert "its images are read in another way" in found.mismatches[0].problem

    flip(stale / "shards" / cache.manifest.shards[1].name, 900)
    before = files_of(stale)
    refused = CliRunner().invoke(app, ["verify", str(stale), "--repair"]).exception
    assert isinstance(refused, CachekdError)
    told = "different reading of images" if (stale / "dump").exists() else "no dump goes on in this folder"
    assert told in str(refused)
    assert files_of(stale) == before


def test_caches_of_two_readings_are_merged_and_then_it_is_not_known(stale, teacher_path, tmp_path):
    write_tar(tmp_path / "more" / "0.tar", tar_members(2, start=12))
    new = dump_cache(tmp_path / "new", teacher_path, tmp_path / "more", tail="none")
    merged = merge_caches([new, stale], tmp_path / "merged")
    assert merged.fingerprints.image_reading is None
    assert merged.fingerprints.encoding == Manifest.load(new).fingerprints.encoding is not None
    write_tar(tmp_path / "last" / "0.tar", tar_members(2, start=14))
    last = dump_cache(tmp_path / "last-cache", teacher_path, tmp_path / "last", tail="none")
    assert merge_caches([new, last], tmp_path / "both").fingerprints.image_reading == READING


def test_what_is_not_known_is_not_written(unrecorded, old):
    assert is_canonical(unrecorded / "manifest.json")
    manifest = Manifest.load(unrecorded)
    assert manifest.fingerprints.image_reading is None
    assert manifest.to_json() == (unrecorded / "manifest.json").read_bytes()
    assert "image reading" not in overview.fingerprints(manifest)
    assert overview.fingerprints(Manifest.load(old))["image reading"] == "1"
    processor = tiny_processor()
    assert image_reading(processor) == READING
    assert image_reading(TextProcessor(processor.tokenizer)) is None  # a language model sees none


def test_equal_dumps_leave_out_the_same_and_name_the_image(teacher_path, tmp_path):
    data = write_llava_json(tmp_path / "data", 8)
    (data.parent / "1.png").write_bytes(b"<html>not found</html>")
    (data.parent / "3.png").unlink()
    records = json.loads(data.read_text())
    records.append({"id": "far", "image": "https://a.b/c.png", "conversations": conversation(1)})
    data.write_text(json.dumps(records))
    settings = {"on_error": "skip", "tail": "none"}
    first, again = (
        files_of(dump_cache(tmp_path / name, teacher_path, data, **settings)) for name in ("a", "b")
    )
    assert first == again
    assert [json.loads(line) for line in first["skipped.jsonl"].splitlines()] == [
        {
            "key": "s001",
            "reason": "the image '1.png' cannot be read: not a picture in any format that Pillow knows",
        },
        {"key": "s003", "reason": "the image '3.png' is missing: no such file"},
        {
            "key": "far",
            "reason": "the image 'https://a.b/c.png' is an address, and images are not fetched from one",
        },
    ]
