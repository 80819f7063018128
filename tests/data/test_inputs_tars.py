"""Tars: by pattern and URL, indexed whole or not at all, read in place."""

from __future__ import annotations

import json
import pickle
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.data import SampleEncoder, open_samples, read_encoded
from cachekd.errors import BadSample, CachekdError
from tiny import (
    ANSWERED,
    noise_image,
    plain_error,
    png_bytes,
    tar_members,
    tiny_processor,
    write_tar,
)


def spread(folder: Path, tars: int = 3) -> list[Path]:
    """Six samples over some tars."""
    members = tar_members(6)
    step = len(members) // tars
    return [
        write_tar(folder / f"train-{tar:03d}.tar", members[tar * step : (tar + 1) * step])
        for tar in range(tars)
    ]


def test_patterns_and_urls_read_the_same_samples(tmp_path: Path, monkeypatch):
    tars = spread(tmp_path / "d")
    (tmp_path / "d" / "notes.txt").write_text("not data")
    memory = fsspec.filesystem("memory")
    for tar in tars:
        memory.pipe(f"/inputs/{tar.name}", tar.read_bytes())
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "d"
    expected = open_samples(folder)
    assert expected.keys == [f"s{i:03d}" for i in range(6)]
    specs = [
        folder / "train-*.tar",
        "d/train-00?.tar",
        "d/train-{000..002}.tar",
        "d/{train-000,train-00[12]}.tar",
        f"file://{folder}/train-{{000..002}}.tar",
        f"file://{folder}/*.tar",
        f"file://{folder}",
        "memory://inputs/*.tar",
        "memory://inputs/train-{000..002}.tar",
        "simplecache::memory://inputs/*.tar",
        f"simplecache::file://{folder}/train-{{000..002}}.tar",
    ]
    for spec in specs:
        samples = open_samples(spec)
        assert samples.keys == expected.keys, spec
        assert samples[5].content_hash == expected[5].content_hash, spec
        again = pickle.loads(pickle.dumps(samples))
        assert again[0].content_hash == expected[0].content_hash, spec
    assert open_samples("d/train-{002..000}.tar").keys == [f"s{i:03d}" for i in (4, 5, 2, 3, 0, 1)]
    memory.rm("/inputs", recursive=True)


class RangeServer(BaseHTTPRequestHandler):
    """Serves one folder's files and ranges of them, as an object store does."""

    folder: Path

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.folder / Path(self.path.partition("?")[0]).name
        if not path.is_file():
            self.send_error(404)
            return
        content, first = path.read_bytes(), self.headers.get("Range")
        self.send_response(206 if first else 200)
        if first:
            start, end = first.removeprefix("bytes=").split("-")
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            content = content[int(start) : int(end) + 1]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path: Path):
    """The URL of a folder with tars."""
    handler = type("Handler", (RangeServer,), {"folder": tmp_path / "d"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_tars_over_http_also_in_forked_workers(tmp_path: Path, served):
    tars = spread(tmp_path / "d")
    samples = open_samples(served + "/train-{000..002}.tar?signature=a1b")
    local = open_samples(tmp_path / "d")
    assert samples.keys == local.keys
    assert samples[3].content_hash == local[3].content_hash  # this process now has a connection to inherit
    encoder = SampleEncoder(tiny_processor())
    read = list(read_encoded(samples, encoder, range(6), workers=2))
    assert [one.content_hash for one in read] == [local[i].content_hash for i in range(6)]
    tars[1].unlink()
    with pytest.raises(CachekdError, match="does not exist, or has gone") as caught:
        samples[2]
    assert "train-001.tar" in plain_error(caught)


def test_several_images_come_in_numeric_order(tmp_path: Path):
    turns = {"messages": [{"role": "user", "content": "what?"}, ANSWERED[1]], "image": "ignored.png"}
    names = [f"a.{number}.png" for number in (10, 2, *range(3, 10), 11)]
    members = [(name, png_bytes(noise_image(int(name.split(".")[1])))) for name in names]
    tar = write_tar(tmp_path / "d.tar", [*members, ("a.json", json.dumps(turns).encode()), ("a.TXT", b"")])
    images = open_samples(tar)[0].images
    assert [image.tobytes() for image in images] == [noise_image(i).tobytes() for i in range(2, 12)]


@pytest.mark.parametrize(
    "names",
    [("a.png", "a.jpg"), ("a.0.png", "a.2.png"), ("a.0.png", "a.0.jpg"), ("a.png", "a.1.png")],
)
def test_images_without_a_clear_order_are_refused(tmp_path: Path, names):
    members = [(name, png_bytes(noise_image(0))) for name in names]
    tar = write_tar(tmp_path / "d.tar", [*members, ("a.json", json.dumps({"messages": ANSWERED}).encode())])
    with pytest.raises(BadSample, match="no clear order") as caught:
        open_samples(tar)[0]
    assert names[0] in str(caught.value)


def test_members_need_not_be_neighbours(tmp_path: Path):
    members = tar_members(3)
    shuffled = [members[i] for i in (0, 2, 5, 3, 4, 1)]
    samples = open_samples(write_tar(tmp_path / "a.tar", shuffled))
    assert samples.keys == ["s000", "s001", "s002"]
    assert samples[2].content_hash == open_samples(write_tar(tmp_path / "b.tar", members))[2].content_hash


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 20 * 512), data=st.data())
def test_a_truncated_tar_is_never_a_shorter_data_set(tmp_path_factory, cut, data):
    folder = tmp_path_factory.mktemp("cut")
    whole = write_tar(folder / "d.tar", tar_members(2))
    content = whole.read_bytes()
    end = len(content.rstrip(b"\0")) + 511 & ~511  # the zero blocks after this say that it ends
    if data.draw(st.booleans()):
        cut = cut // 512 * 512
    whole.write_bytes(content[: min(cut, end)])
    with pytest.raises(CachekdError) as caught:
        open_samples(whole)
    assert "cannot be read to its end" in plain_error(caught)


def test_odd_tars_are_refused_not_half_read(tmp_path: Path):
    good = write_tar(tmp_path / "good.tar", tar_members(1)).read_bytes()
    more = write_tar(tmp_path / "more.tar", tar_members(1, start=5)).read_bytes()
    joined, garbage, packed = tmp_path / "joined.tar", tmp_path / "garbage.tar", tmp_path / "packed.tar"
    joined.write_bytes(good + more)
    garbage.write_bytes(good.rstrip(b"\0") + b"?" * 2000)
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(tmp_path / "good.tar", "x.json")
    for path in (joined, garbage, packed):
        with pytest.raises(CachekdError, match="cannot be read to its end") as caught:
            open_samples(path)
        assert str(path) in plain_error(caught)
    linked = tmp_path / "linked.tar"
    with tarfile.open(linked, "w") as tar:
        info = tarfile.TarInfo("x.json")
        info.type, info.linkname = tarfile.LNKTYPE, "y.json"
        tar.addfile(info)
    with pytest.raises(CachekdError, match="no plain file"):
        open_samples(linked)
    with pytest.raises(CachekdError, match="not valid text"):
        open_samples(write_tar(tmp_path / "latin.tar", [("\udce9.json", b"{}")]))


def test_a_tar_that_vanishes_or_shrinks_is_not_a_bad_sample(tmp_path: Path):
    tars = spread(tmp_path)
    samples = open_samples(tmp_path)
    tars[0].write_bytes(tars[0].read_bytes()[:100])
    tars[1].unlink()
    with pytest.raises(CachekdError, match="has become shorter") as caught:
        samples[0]
    assert "train-000.tar" in plain_error(caught)
    with pytest.raises(CachekdError, match="has gone") as caught:
        samples[2]
    assert "train-001.tar" in plain_error(caught)
    assert len(samples[4].images) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tmp}/none-*.tar", "no tar matches"),
        ("{tmp}/none-{{0..2}}.tar", "does not exist"),
        ("{tmp}/none-{{0..2.tar", "unbalanced braces"),
        ("{tmp}/none.tar", "does not exist"),
        ("memory://nowhere/*.tar", "no tar matches"),
        ("memory://nowhere/0.tar", "does not exist"),
        ("memory://nowhere", "no tar matches"),
        ("warp://host/0.tar", "cannot be read"),
        ("http://127.0.0.1:9/0.tar", "does not exist|cannot be read"),
        ("{tmp}/" + "x" * 300, "does not exist"),
        ("data/none.json", "does not exist"),
        ("data/none.tar", "does not exist"),
        ("memory://" + "x" * 300 + ".tar", "does not exist"),
        ("{tmp}?split=train", "no data found|options are for"),
        ("{tmp}/a.json?split=train", "options are for"),
    ],
)
def test_what_is_not_there_is_said_to_be_so(tmp_path: Path, spec, message):
    with pytest.raises(CachekdError, match=message) as caught:
        open_samples(spec.format(tmp=tmp_path))
    plain_error(caught)


def test_the_index_of_a_tar_is_small(tmp_path: Path):
    import tracemalloc

    count = 2000
    members = [(f"s{i:08d}.{end}", b"") for i in range(count) for end in ("png", "json")]
    path = str(write_tar(tmp_path / "d.tar", members))
    open_samples(path)  # import and cache what needs it
    tracemalloc.start()
    samples = open_samples(path)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(samples) == count
    assert size / count < 150  # of which the key is 66
