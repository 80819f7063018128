"""examples/emoji: vendors' packages become questions, in two containers that are read alike."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cachekd.cache import LogitCache
from cachekd.config import DumpConfig
from cachekd.data import SampleEncoder, open_samples
from cachekd.data.open import content_hash
from cachekd.dump import dump
from cachekd.errors import CachekdError
from cachekd.models import load_processor
from cachekd.pipeline import plan_steps, read_pipeline
from caches import ROOT
from tiny import png_bytes

SORTS = [
    ("Animals & Nature", "animal-bird"),
    ("Animals & Nature", "plant-flower"),
    ("Food & Drink", "food-fruit"),
    ("Food & Drink", "drink"),
    ("Smileys & Emotion", "cat-face"),
    ("People & Body", "person-role"),
    ("Flags", "country-flag"),
    ("Travel & Places", "transport-air"),
]


@pytest.fixture(scope="module", autouse=True)
def example():
    """Its scripts import one another as modules of their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "emoji"))
        yield


def entry(number: int, **changes) -> dict:
    category, subcategory = SORTS[number % len(SORTS)]
    said = {"image": f"1f{number:03x}.png", "name": f"THING {number}", "category": category}
    return said | {"subcategory": subcategory} | changes


def drawing(vendor: str, number: int) -> bytes:
    draw = random.Random(f"{vendor} {number}")
    pixels = np.zeros((64, 64, 4), np.uint8)
    left, top = draw.randrange(20), draw.randrange(20)
    pixels[top : top + 40, left : left + 40] = [*draw.randbytes(3), draw.choice([128, 255])]
    return png_bytes(Image.fromarray(pixels))


ENTRIES = [entry(number) for number in range(80)] + [
    entry(80, name="THING 3"),  # as another
    entry(81),  # google draws it as 82
    entry(82),
    entry(83),  # facebook does not draw it
    entry(84, category="Component", subcategory="skin-tone"),
]
USABLE = {f"1f{number:03x}" for number in range(80) if number != 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, example):
    """The three packages in npm's layout, whose checksums are the pinned ones for as long."""
    import packages

    folder = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        for vendor, package in packages.VENDORS.items():
            members = {"package/emoji.json": json.dumps(ENTRIES).encode(), "package/README.md": b"# read me"}
            for number in range(len(ENTRIES)):
                if (vendor, number) != ("facebook", 83):
                    picture = drawing(vendor, 82 if (vendor, number) == ("google", 81) else number)
                    members[f"package/img/{vendor}/64/1f{number:03x}.png"] = picture
                    members[f"package/img/{vendor}/sheets/{number}.png"] = b"not looked at"
            with tarfile.open(folder / package.archive, "w:gz") as archive:
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
            digest = hashlib.sha512((folder / package.archive).read_bytes()).digest()
            pinned = replace(package, integrity=base64.b64encode(digest).decode())
            patch.setitem(packages.VENDORS, vendor, pinned)
        yield folder


def write(folder: Path, out: Path, *options: str) -> Path:
    import write_data

    write_data.main(["--out", str(out), "--packages", str(folder), *options])
    return out


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> Path:
    return write(folder, tmp_path_factory.mktemp("written"))


def asked_of(sample) -> list[tuple[str, str]]:
    texts = [message["content"][-1]["text"] for message in sample.messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


# ---- what is asked


def test_a_thing_whose_name_cannot_be_seen_is_left_out(folder):
    from things import read_pictures

    pictures = read_pictures(["google", "twitter", "facebook"], folder)
    assert Counter(picture.thing.code for picture in pictures) == dict.fromkeys(USABLE, 3)
    assert {picture.png for picture in pictures if picture.key == "twitter-1f005"} == {drawing("twitter", 5)}
    two = {picture.thing.code for picture in read_pictures(["twitter", "google"], folder)}
    assert two == USABLE | {"1f053"}


def test_train_and_test_are_other_hands_and_unseen_are_other_things(written):
    parts = {name: open_samples(written / name) for name in ("train", "test", "unseen")}
    hands = {name: {key.split("-")[0] for key in part.keys} for name, part in parts.items()}
    assert hands == {"train": {"google", "twitter"}, "test": {"facebook"}, "unseen": {"facebook"}}
    codes = {name: {key.split("-")[1] for key in part.keys} for name, part in parts.items()}
    assert codes["train"] == codes["test"]
    assert codes["unseen"] == USABLE - codes["train"]
    assert 0 < len(codes["unseen"]) < 20


def test_every_answer_is_true_and_a_kind_tells_nothing(written):
    from things import KINDS

    by_code = {entry["image"].removesuffix(".png"): entry for entry in ENTRIES}
    for name in ("train", "test", "unseen"):
        answers: dict[str, Counter[str]] = {}
        samples = open_samples(written / name)
        for key, sample in zip(samples.keys, samples, strict=True):
            said = by_code[key.split("-")[1]]
            pairs = dict(asked_of(sample))
            assert pairs.pop("which group does it belong to?") == said["category"].lower()
            assert pairs.pop("what is this?", None) == (None if name == "unseen" else said["name"].lower())
            for question, answer in pairs.items():
                kind = question.removeprefix("is this ").removesuffix("?")
                holds = KINDS[kind](said["category"], said["subcategory"])
                assert answer == ("yes" if holds else "no"), question
                answers.setdefault(kind, Counter())[answer] += 1
        assert all(count["yes"] == count["no"] for count in answers.values())
        assert name == "unseen" or len(answers) == 7


def test_the_order_of_questions_is_not_always_the_same(written):
    first = {asked_of(sample)[0][0].split()[0] for sample in open_samples(written / "train")}
    assert first == {"what", "which", "is"}


# ---- how it is written


def test_tars_and_a_datasets_folder_are_read_to_the_same_samples(written):
    for name in ("train", "test", "unseen"):
        tars, table = open_samples(written / name), open_samples(written / "datasets" / name)
        assert list(tars.keys) == list(table.keys)
        assert content_hash(tars) == content_hash(table)
        for one, other in zip(tars, table, strict=True):
            assert one.messages == other.messages
            assert one.images[0].tobytes() == other.images[0].tobytes()
    [picture] = open_samples(written / "test")[0].images
    assert (picture.mode, picture.size, picture.getpixel((63, 63))) == ("RGB", (64, 64), (255, 255, 255))


def test_the_same_bytes_again_and_fewer_are_the_first_ones(folder, written, tmp_path):
    again = write(folder, tmp_path / "again")
    fewer = write(folder, tmp_path / "fewer", "--images", "30")
    for name in ("train", "test", "unseen"):
        assert (again / name / "000.tar").read_bytes() == (written / name / "000.tar").read_bytes()
    assert list(open_samples(fewer / "train").keys) == list(open_samples(written / "train").keys)[:30]
    assert (fewer / "test" / "000.tar").read_bytes() == (written / "test" / "000.tar").read_bytes()
    other = write(folder, tmp_path / "other", "--train", "facebook", "--test", "google")
    assert {key.split("-")[0] for key in open_samples(other / "train").keys} == {"facebook"}


# ---- what goes wrong


def fake_npm(tmp_path: Path, monkeypatch, script: str | None) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{script}\n")
        os.chmod(tmp_path / "npm", 0o755)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "npm is not installed"),
        ("echo 'npm error network ENOTFOUND' >&2; exit 1", "npm error network ENOTFOUND"),
        ("exit 0", "could not fetch a package"),
    ],
)
def test_without_npm_or_a_registry_a_person_reads_what_to_do(tmp_path, monkeypatch, script, said, capsys):
    fake_npm(tmp_path, monkeypatch, script)
    with pytest.raises(SystemExit) as caught:
        write(tmp_path / "none", tmp_path / "out")
    assert said in str(caught.value.code)
    assert "emoji-datasource-google-16.0.0.tgz" in str(caught.value.code)
    assert not (tmp_path / "out").exists()


def test_npm_is_asked_for_the_pinned_version(tmp_path, monkeypatch, folder):
    import packages

    google = packages.VENDORS["google"]
    fake_npm(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/asked; /bin/cp {folder}/{google.archive} "$4"')
    path = packages.fetch(google, tmp_path / "kept")
    assert (tmp_path / "asked").read_text().split()[-1] == "emoji-datasource-google@16.0.0"
    os.remove(tmp_path / "npm")
    assert packages.fetch(google, tmp_path / "kept") == path  # once is enough


def test_another_archive_than_the_pinned_one_is_refused(tmp_path, folder):
    import packages

    google = packages.VENDORS["google"]
    (tmp_path / google.archive).write_bytes((folder / google.archive).read_bytes()[:-1] + b"!")
    with pytest.raises(CachekdError, match="not the package") as caught:
        packages.fetch(google, tmp_path)
    assert google.integrity in caught.value.expected


def test_a_vendor_is_not_trained_on_and_tested_on(tmp_path, folder, capsys):
    with pytest.raises(SystemExit):
        write(folder, tmp_path / "out", "--test", "google")
    assert "draws the training pictures too" in capsys.readouterr().err


# ---- its models


def test_models_are_trained_saved_and_read_the_data_as_they_were_taught(folder, written, tmp_path):
    import train_models

    out = tmp_path / "models"
    few = ["--tower-steps", "2", "--epochs", "1", "--student-tower-steps", "1", "--student-epochs", "1"]
    train_models.main(["--out", str(out), "--packages", str(folder), *few])
    processor = load_processor(str(out / "teacher"))
    encode, tokens = SampleEncoder(processor), train_models.Tokens(processor)
    sample = open_samples(written / "train")[0]
    encoded = encode(sample)
    ids, labels = tokens([asked_of(sample)])
    assert encoded.inputs["input_ids"].flatten().tolist() == ids[0].tolist()
    assert encoded.token_ids.tolist() == labels[labels != train_models.IGNORE].tolist()
    dump(
        DumpConfig(teacher=str(out / "teacher"), data=str(written / "test"), out=tmp_path / "cache", limit=8)
    )
    assert len(LogitCache(tmp_path / "cache")) == 8
    assert (out / "student" / "model.safetensors").stat().st_size < 2 * 2**20


def test_its_pipeline_trains_both_students_alike_from_the_same_start(monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = {
        step.name: step.config for step in plan_steps(read_pipeline(Path("examples/emoji/pipeline.yaml")))
    }
    ce, switch_kd = (steps[name].model_dump() for name in ("ce", "switch-kd"))
    different = {name for name in ce if ce[name] != switch_kd[name]}
    assert different == {"out", "cache", "teacher", "lambda_align", "lambda_vsd"}
    assert steps["scores"].data != ce["data"]


@pytest.mark.slow
def test_the_real_packages(tmp_path):
    import packages
    from things import read_pictures

    try:
        for package in packages.VENDORS.values():
            packages.fetch(package)
    except CachekdError as error:
        pytest.skip(f"the packages cannot be had here: {error}")
    out = write(packages.FOLDER, tmp_path)
    assert [len(open_samples(out / name)) for name in ("train", "test", "unseen")] == [3200, 1600, 205]
    pictures = read_pictures(packages.VENDORS)
    sizes = {Image.open(io.BytesIO(picture.png)).size for picture in pictures}
    assert sizes == {(64, 64)}
    first, *_ = open_samples(out / "datasets" / "test")
    assert first.images[0].size == (64, 64)
