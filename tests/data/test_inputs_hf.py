"""Hugging Face `datasets`: every form on disk, the hub, columns, keys and broken rows."""

from __future__ import annotations

import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cachekd.data import SampleEncoder, open_samples, read_encoded
from cachekd.errors import BadSample, CachekdError
from tiny import conversation, noise_image, plain_error, png_bytes, tiny_processor, write_llava_json


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def chat(index: int) -> list[dict]:
    """The turns of `tiny.conversation` as messages of parts, an image first."""
    messages = []
    for turn in conversation(index):
        user = turn["from"] == "human"
        text = {"type": "text", "text": turn["value"].removeprefix("<image>\n")}
        image = [{"type": "image"}] if turn["value"].startswith("<image>") else []
        messages.append({"role": "user" if user else "assistant", "content": [*image, text]})
    return messages


def table(count: int, *, start: int = 0, form: str = "image") -> datasets.Dataset:
    """Rows as people publish them: one image and LLaVA turns, or a list of images and chat messages."""
    numbers = range(start, start + count)
    encoded = [{"bytes": png_bytes(noise_image(i)), "path": None} for i in numbers]
    keys = [f"s{i:03d}" for i in numbers]
    if form == "image":
        rows = {"id": keys, "image": encoded, "conversations": [conversation(i) for i in numbers]}
        return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    rows = {"key": keys, "images": [[e] for e in encoded], "messages": [chat(i) for i in numbers]}
    return datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))


@pytest.fixture
def expected(tmp_path: Path):
    return open_samples(write_llava_json(tmp_path / "json", 6))


def check(samples, expected) -> None:
    assert samples.keys == expected.keys
    for index in range(len(expected)):
        assert samples[index].content_hash == expected[index].content_hash
        assert samples[index].key == expected.keys[index]


@pytest.mark.parametrize("form", ["image", "images"])
def test_every_form_on_disk_reads_the_same_samples(tmp_path: Path, expected, form):
    whole = table(6, form=form)
    whole.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"train": whole, "test": table(2, form=form)}).save_to_disk(tmp_path / "dict")
    parts = tmp_path / "parts" / "data"
    parts.mkdir(parents=True)
    table(4, form=form).to_parquet(parts / "train-00000-of-00002.parquet")
    table(2, start=4, form=form).to_parquet(parts / "train-00001-of-00002.parquet")
    table(2, form=form).to_parquet(parts / "test-00000-of-00001.parquet")
    whole.to_parquet(tmp_path / "one.parquet")
    for spec in (
        tmp_path / "saved",
        f"{tmp_path}/dict?split=train",
        f"{tmp_path}/parts?split=train",
        f"{parts}/train-*.parquet",
        tmp_path / "one.parquet",
        f"{tmp_path}/saved/*.arrow",
    ):
        samples = open_samples(spec)
        check(samples, expected)
        check(pickle.loads(pickle.dumps(samples)), expected)
    assert len(open_samples(f"{tmp_path}/parts?split=test")) == 2
    assert open_samples(f"{tmp_path}/parts?split=train[1:3]").keys == expected.keys[1:3]
    for spec in (f"{tmp_path}/dict", f"{tmp_path}/parts"):
        with pytest.raises(CachekdError, match="several splits") as caught:
            open_samples(spec)
        assert "train" in plain_error(caught)
        assert "test" in plain_error(caught)
        with pytest.raises(CachekdError, match=r"(?i)split"):
            open_samples(f"{spec}?split=dev")


def test_forked_workers_read_rows(tmp_path: Path, expected):
    table(6).save_to_disk(tmp_path / "saved")
    read = read_encoded(
        open_samples(tmp_path / "saved"), SampleEncoder(tiny_processor()), range(6), workers=2
    )
    assert [one.content_hash for one in read] == [expected[index].content_hash for index in range(6)]


def test_keys_are_a_column_or_row_numbers(tmp_path: Path):
    rows = table(3)
    for column in ("id", "key", "__key__"):
        rows.remove_columns("id").add_column(column, rows["id"][:]).save_to_disk(tmp_path / column)
        assert open_samples(tmp_path / column).keys == ["s000", "s001", "s002"]
    rows.remove_columns("id").save_to_disk(tmp_path / "none")
    assert open_samples(tmp_path / "none").keys == ["00000000", "00000001", "00000002"]
    numbers = rows.remove_columns("id").add_column("id", [3, 1, 2])
    numbers.save_to_disk(tmp_path / "numbers")
    assert open_samples(tmp_path / "numbers").keys == ["3", "1", "2"]
    for name, values, keys in (
        ("twice", ["a", "b", "a"], ["a", "b", "a#2"]),
        ("null", ["a", None, "b"], ["a", "00000001", "b"]),
    ):
        rows.remove_columns("id").add_column("id", values).save_to_disk(tmp_path / name)
        assert open_samples(tmp_path / name).keys == keys


def test_broken_rows_are_bad_samples_and_the_others_are_read(tmp_path: Path):
    noise_image(1).save(tmp_path / "1.png")
    whole = png_bytes(noise_image(0))
    images = [
        {"bytes": whole, "path": None},
        {"bytes": None, "path": "1.png"},
        {"bytes": None, "path": str(tmp_path / "gone.png")},
        {"bytes": whole[:70], "path": None},
        {"bytes": b"garbage", "path": None},
        {"bytes": b"", "path": None},
        None,
        {"bytes": whole, "path": None},
    ]
    turns = [conversation(i) for i in range(7)] + [None]
    rows = datasets.Dataset.from_dict({"image": images, "conversations": turns})
    # By pyarrow: `datasets` would read the files behind the paths and write them into the table.
    pq.write_table(rows.cast_column("image", datasets.Image()).data.table, tmp_path / "rows.parquet")
    samples = open_samples(tmp_path / "rows.parquet")
    assert samples[1].images[0].tobytes() == noise_image(1).tobytes()
    reasons = [
        "missing",
        "cannot be read",
        "cannot be read",
        "cannot be read",
        "placeholders",
        "no conversation",
    ]
    for index, reason in enumerate(reasons, 2):
        with pytest.raises(BadSample, match=reason) as caught:
            samples[index]
        assert f"row {index}" in str(caught.value)
    assert len(samples[0].images) == 1


def test_older_lists_of_mappings_and_other_formats(tmp_path: Path, expected):
    """A saved data set keeps its format (numpy, torch) and its mappings of lists."""
    turns = datasets.Sequence({"from": datasets.Value("string"), "value": datasets.Value("string")})
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(), "conversations": turns}
    )
    rows = [
        {
            "id": f"s{i:03d}",
            "image": noise_image(i),
            "conversations": {n: [t[n] for t in conversation(i)] for n in ("from", "value")},
        }
        for i in range(6)
    ]
    old = datasets.Dataset.from_list(rows, features=features)
    old.with_format("numpy").save_to_disk(tmp_path / "old")
    check(open_samples(tmp_path / "old"), expected)


def test_columns_that_lack_are_told_and_map_makes_them(tmp_path: Path, monkeypatch):
    rows = table(2).remove_columns("conversations").add_column("texts", ["what?|red", "what?|no"])
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(CachekdError, match="id, image, texts") as caught:
        open_samples(tmp_path / "saved")
    assert "--map" in plain_error(caught)
    (tmp_path / "cauldron_like.py").write_text(
        "def read(row):\n"
        "    question, answer = row['texts'].split('|')\n"
        "    turns = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]\n"
        "    return {'images': [row['image']], 'messages': turns}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    samples = open_samples(tmp_path / "saved", map="cauldron_like:read", limit=1)
    assert samples.keys == ["s000"]
    assert samples[0].questions[0][1] == "red"


def test_reading_keys_opens_no_image(tmp_path: Path, monkeypatch):
    table(2).save_to_disk(tmp_path / "saved")
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(1) or original(*args, **kwargs))
    samples = open_samples(tmp_path / "saved")
    assert (samples.keys, opened) == (["s000", "s001"], [])
    assert (len(samples[1].images), opened) == (1, [1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tmp}/saved?split=dev", "no split 'dev'"),
        ("{tmp}/saved?splt=train", "options of the data set cannot be read"),
        ("{tmp}/saved?split=", "options of the data set cannot be read"),
        ("{tmp}/saved?split=a&split=b", "options of the data set cannot be read"),
        ("{tmp}/saved?name=x", "name cannot be chosen here"),
        ("{tmp}/none.parquet", "does not exist"),
        ("{tmp}/none-*.parquet", "does not exist"),
        ("{tmp}/text.parquet", "cannot be loaded"),
        ("{tmp}/broken", "cannot be loaded"),
        ("{tmp}/both", "both tars and tables"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, spec, message):
    table(2).save_to_disk(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "broken")
    next((tmp_path / "broken").glob("*.arrow")).unlink()
    (tmp_path / "text.parquet").write_text("no table")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "0.tar").touch()
    (tmp_path / "both" / "0.parquet").touch()
    with pytest.raises(CachekdError, match=message) as caught:
        open_samples(spec.format(tmp=tmp_path))
    assert str(tmp_path) in plain_error(caught)


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CachekdError, match="the hub cannot be reached") as caught:
        open_samples("org/name?split=train")
    assert "org/name" in plain_error(caught)


class Refusing(BaseHTTPRequestHandler):
    """The hub, when it does not know a data set or one of its revisions."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RevisionNotFound" if "/revision/" in self.path else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def test_what_the_hub_says_is_passed_on(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for spec, message in (("org/name", "does not exist"), ("org/name?revision=v9", "the hub refuses")):
        with pytest.raises(CachekdError, match=message) as caught:
            open_samples(spec)
        assert "org/name" in plain_error(caught)
    server.shutdown()
    server.server_close()


def test_offline_a_hub_name_is_looked_up_in_the_cache_only(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CachekdError, match="cannot be loaded") as caught:
        open_samples("org/name?split=train")
    assert "org/name" in plain_error(caught)


def test_a_folder_that_is_deleted_stays_readable_where_it_is_open(tmp_path: Path, expected):
    table(6).save_to_disk(tmp_path / "saved")
    samples = open_samples(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    check(samples, expected)
