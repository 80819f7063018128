"""Publishing and fetching caches: whole or not there, verified, resumed; a hub over HTTP, fsspec for real."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub.constants
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from cachekd.cache import LogitCache, Manifest, verify_files
from cachekd.cache.derive import merge_caches
from cachekd.cache.recompress import recompress
from cachekd.check.bind import open_bound
from cachekd.errors import CachekdError
from cachekd.hub import local_folder, pull_cache, push_cache
from cachekd.hub.push import dataset_card
from cachekd_cli.main import app
from caches import assert_same_samples, copied, files_of, flip, reseal

REPO = "org/cache"


class WatchedFileSystem(MemoryFileSystem):
    """watched://: a file system in memory that shows each of its states, and can fail before a write."""

    protocol = "watched"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    states: list[dict[str, bytes]] = []  # noqa: RUF012
    writes_left: int | None = None
    failure: type[BaseException] = ConnectionResetError

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("watched://", "memory://"))

    def _before(self) -> None:
        if WatchedFileSystem.writes_left == 0:
            raise self.failure("the connection was cut")
        if WatchedFileSystem.writes_left is not None:
            WatchedFileSystem.writes_left -= 1

    def _after(self) -> None:
        WatchedFileSystem.states.append(self.files())

    def files(self) -> dict[str, bytes]:
        return {name: self.cat_file(name) for name in self.find("/")}

    def put_file(self, *args: Any, **kwargs: Any) -> None:
        self._before()
        super().put_file(*args, **kwargs)
        self._after()

    def pipe_file(self, *args: Any, **kwargs: Any) -> None:
        self._before()
        super().pipe_file(*args, **kwargs)
        self._after()

    def mv(self, *args: Any, **kwargs: Any) -> None:
        self._before()
        super().mv(*args, **kwargs)
        self._after()


fsspec.register_implementation("watched", WatchedFileSystem, clobber=True)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries."""
    monkeypatch.setattr("cachekd.hub.reach._WAITS", (0.01, 0.01, 0.01))


@pytest.fixture
def watched() -> WatchedFileSystem:
    WatchedFileSystem.store.clear()
    WatchedFileSystem.states.clear()
    WatchedFileSystem.writes_left = None
    return fsspec.filesystem("watched")


def published(path: Path) -> dict[str, bytes]:
    """What of a cache is published, beside its card."""
    names = [file.name for file in Manifest.load(path).files]
    return {name: (path / name).read_bytes() for name in [*names, "manifest.json"]}


def assert_nothing_or_a_cache(files: dict[str, bytes]) -> bool:
    """Whether it is a cache; then all of it is there."""
    if "manifest.json" not in files:
        return False
    manifest = Manifest.model_validate_json(files["manifest.json"])
    for file in manifest.files:
        assert hashlib.sha256(files[file.name]).hexdigest() == file.sha256
    return True


def without_card(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in ("README.md", ".gitattributes")}


def test_to_the_hub_and_back(hub, skipping_cache, tmp_path):
    seen: list[int] = []
    pushed = push_cache(skipping_cache, REPO, license="mit", progress=seen.append)
    size = sum(file.bytes for file in Manifest.load(skipping_cache).files)
    assert sum(seen) == 3 * size - Manifest.load(skipping_cache).skipped.bytes
    assert (pushed.uploaded, pushed.skipped, pushed.kept_card) == (8, 0, False)
    assert without_card(hub.repos[REPO].tree()) == published(skipping_cache)  # and not the dump's records
    pulled = pull_cache(REPO, tmp_path / "out")
    assert files_of(tmp_path / "out") == published(skipping_cache)
    assert (pulled.fetched, pulled.kept, pulled.bytes) == (6, 0, size)
    assert verify_files(tmp_path / "out") == []
    assert_same_samples(tmp_path / "out", skipping_cache)
    again = pull_cache(f"hf://datasets/{REPO}", tmp_path / "out")
    assert (again.fetched, again.kept) == (0, 6)


def test_on_the_hub_the_manifest_comes_last(hub, skipping_cache):
    push_cache(skipping_cache, REPO)
    trees = [without_card(tree) for _, tree in hub.repos[REPO].branches["main"]]
    assert [assert_nothing_or_a_cache(tree) for tree in trees] == [False] * (len(trees) - 1) + [True]
    assert trees[-1].keys() - trees[-2].keys() == {"manifest.json"}


def test_an_upload_that_was_cut_short_goes_on(hub, skipping_cache, tmp_path):
    hub.uploads_left = 2
    with pytest.raises(CachekdError, match=r"cannot be uploaded[\s\S]*403[\s\S]*again") as caught:
        push_cache(skipping_cache, REPO)
    assert caught.value.where == f"hf://datasets/{REPO}"
    with pytest.raises(CachekdError, match="not yet published as a whole"):
        pull_cache(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.uploads_left = None
    push_cache(skipping_cache, REPO)
    assert without_card(hub.repos[REPO].tree()) == published(skipping_cache)
    assert len(hub.uploaded) == len(set(hub.uploaded)) == 5  # three shards, sketch and vocabulary, once each


def test_what_is_there_is_not_sent_again(hub, skipping_cache):
    push_cache(skipping_cache, REPO, license="mit")
    history = list(hub.repos[REPO].branches["main"])
    again = push_cache(skipping_cache, REPO, license="mit")
    assert (again.uploaded, again.skipped, again.bytes, again.kept_card) == (0, 8, 0, False)
    assert hub.repos[REPO].branches["main"] == history
    hub.repos[REPO].commit({"README.md": b"---\nlicense: mit\n---\nMine.\n"})
    assert push_cache(skipping_cache, REPO, license="mit").kept_card
    assert hub.repos[REPO].tree()["README.md"].endswith(b"Mine.\n")


@pytest.mark.parametrize("changed", ["manifest.json", "shards/00001.zarr.zip", "skipped.jsonl"])
def test_other_content_is_never_overwritten(hub, skipping_cache, changed):
    push_cache(skipping_cache, REPO)
    repo = hub.repos[REPO]
    tree = repo.tree()
    if changed != "manifest.json":
        del tree["manifest.json"]  # somebody else's push that was cut short
    tree[changed] = tree[changed][:-1] + b"!"
    before, commits = dict(tree), len(repo.branches["main"])
    with pytest.raises(CachekdError, match="another file under this name") as caught:
        push_cache(skipping_cache, REPO)
    assert caught.value.where.endswith(changed)
    assert "with sha256" in str(caught.value.found)
    assert (repo.tree(), len(repo.branches["main"])) == (before, commits)


def test_a_damaged_cache_is_not_published(hub, skipping_cache, tmp_path):
    cache = copied(skipping_cache, tmp_path / "cache")
    shard = cache / "shards" / "00001.zarr.zip"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CachekdError, match="damaged, and was not published"):
        push_cache(cache, REPO)
    assert hub.repos == {}


def test_private_repositories(hub, skipping_cache, tmp_path, monkeypatch):
    push_cache(skipping_cache, REPO, private=True)
    assert hub.repos[REPO].private
    push_cache(skipping_cache, "org/public")
    with pytest.raises(CachekdError, match="exists already, and is public"):
        push_cache(skipping_cache, "org/public", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(CachekdError, match=r"no such repository[\s\S]*hf auth login"):
        pull_cache(REPO, tmp_path / "out")
    with pytest.raises(CachekdError, match="repository cannot be made"):
        push_cache(skipping_cache, "org/third")


def test_revisions(hub, skipping_cache, tmp_path):
    push_cache(skipping_cache, REPO, revision="v1")
    assert "manifest.json" not in hub.repos[REPO].tree("main")
    assert without_card(hub.repos[REPO].tree("v1")) == published(skipping_cache)
    sha = hub.repos[REPO].branches["v1"][-1][0]
    for place, address in enumerate((f"{REPO}@v1", f"hf://datasets/{REPO}@{sha}")):
        assert pull_cache(address, tmp_path / str(place)).fetched == 6
    with pytest.raises(CachekdError, match="no such revision"):
        pull_cache(REPO, tmp_path / "out", revision="v2")
    with pytest.raises(CachekdError, match="two revisions"):
        pull_cache(f"{REPO}@v1", tmp_path / "out", revision="v2")


def test_a_licence_that_the_hub_does_not_know(hub, skipping_cache):
    with pytest.raises(CachekdError, match=r"Invalid metadata"):
        push_cache(skipping_cache, REPO, license="not-a-license")
    assert "manifest.json" not in hub.repos[REPO].tree()
    with pytest.raises(CachekdError, match="no name of a licence"):
        push_cache(skipping_cache, REPO, license="MIT: or so")


def test_a_cut_connection_is_taken_up_where_it_broke(hub, skipping_cache, tmp_path, monkeypatch):
    push_cache(skipping_cache, REPO)
    hub.cut_after = 1000
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)
    pull_cache(REPO, tmp_path / "out")
    assert verify_files(tmp_path / "out") == []
    assert sorted({first for _, first in hub.downloads}) == [0, 1000]


@pytest.mark.parametrize("content", [b"other", None])
def test_what_the_hub_has_otherwise_is_not_downloaded(hub, skipping_cache, tmp_path, content):
    push_cache(skipping_cache, REPO)
    name, (_, tree) = "sketch.zarr.zip", hub.repos[REPO].branches["main"][-1]
    digest = hashlib.sha256(tree.pop(name)).hexdigest()
    if content is not None:
        tree[name] = content
    with pytest.raises(CachekdError, match="not the one that the manifest lists") as caught:
        pull_cache(REPO, tmp_path / "out")
    assert caught.value.where == f"hf://datasets/{REPO}/{name}"
    assert caught.value.found == ("no file" if content is None else "5 bytes")
    fetched = {oid for oid, _ in hub.downloads}
    assert not fetched & {digest, hashlib.sha256(b"other").hexdigest()}
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.slow
def test_a_killed_pull_goes_on(hub, skipping_cache, tmp_path):
    push_cache(skipping_cache, REPO)
    hub.stall_after = 1000
    out = tmp_path / "out"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "cachekd_cli.main", "pull", REPO, str(out)]
    process = subprocess.Popen(command, env=environment)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.go_on.set()
    assert not (out / "manifest.json").exists()
    with pytest.raises(CachekdError, match="not a cache"):
        LogitCache(out)
    pulled = pull_cache(REPO, out)
    assert pulled.fetched >= 1
    assert files_of(out) == published(skipping_cache)


def test_anything_over_plain_http(hub, skipping_cache, tmp_path):
    push_cache(skipping_cache, REPO)
    address = f"{hub.url}/datasets/{REPO}/resolve/main"
    pull_cache(address, tmp_path / "out")
    assert files_of(tmp_path / "out") == published(skipping_cache)


@pytest.mark.parametrize("scheme", ["memory", "file", "watched"])
def test_any_file_system_of_fsspec(watched, skipping_cache, tmp_path, scheme):
    address = f"{scheme}://{tmp_path}/remote/cache"
    first, again = push_cache(skipping_cache, address), push_cache(skipping_cache, address)
    assert (first.uploaded, again.uploaded, again.skipped) == (8, 0, 8)
    fs, root = fsspec.core.url_to_fs(address)
    there = {name.removeprefix(f"{root}/"): fs.cat_file(name) for name in fs.find(root)}
    assert without_card(there) == published(skipping_cache)
    pull_cache(address, tmp_path / "out")
    assert files_of(tmp_path / "out") == published(skipping_cache)
    with pytest.raises(CachekdError, match="only repositories of the hub"):
        pull_cache(address, tmp_path / "other", revision="v1")
    with pytest.raises(CachekdError, match="--private is for the hub"):
        push_cache(skipping_cache, address, private=True)


def test_wherever_it_is_cut_a_reader_sees_nothing_or_a_cache(watched, skipping_cache):
    writes = 1 + 2 * 7 + 1  # the claim; each file is put, then named; the manifest
    for left in range(writes + 1):
        WatchedFileSystem.writes_left = left
        try:
            push_cache(skipping_cache, "watched:///c")
        except CachekdError as error:
            assert "ConnectionResetError" in str(error)  # noqa: PT017
            # From where it was cut, or from the beginning: both are tried, in turn.
            if left % 2:
                WatchedFileSystem.store.clear()
    states = [
        {name.removeprefix("/c/"): content for name, content in state.items()} for state in watched.states
    ]
    assert {assert_nothing_or_a_cache(state) for state in states} == {False, True}
    assert assert_nothing_or_a_cache(states[-1])
    assert set(without_card(watched.files())) == {f"/c/{name}" for name in published(skipping_cache)} | {
        "/c/README.md"
    }


def test_a_pull_goes_on_by_file(watched, skipping_cache, tmp_path):
    push_cache(skipping_cache, "watched:///c")
    files = Manifest.load(skipping_cache).files
    out, big = tmp_path / "out", files[0]
    del watched.store["/c/sketch.zarr.zip"]
    with pytest.raises(CachekdError, match="not the one that the manifest lists"):
        pull_cache("watched:///c", out)
    assert not (out / "manifest.json").exists()
    # As a process leaves it that is killed in the middle of a file. What is whole is not asked for.
    (out / ".pull" / "sketch.zarr.zip").write_bytes(b"?" * 500)
    watched.pipe_file("/c/sketch.zarr.zip", (skipping_cache / "sketch.zarr.zip").read_bytes())
    whole = [file.name for file in files if (out / file.name).exists()]
    for name in whole:
        watched.rm_file(f"/c/{name}")
    pulled = pull_cache("watched:///c", out) if big.name in whole else None
    if pulled is not None:
        assert pulled.kept == len(whole) > 0
        assert files_of(out) == published(skipping_cache)


@pytest.fixture
def remote(skipping_cache: Path, tmp_path: Path) -> Path:
    """A published cache in a folder, to be spoiled."""
    push_cache(skipping_cache, f"file://{tmp_path}/remote")
    return tmp_path / "remote"


def _wrong(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def _short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!" * 10_000_000)


@pytest.mark.parametrize("spoil", [_wrong, _short, _long, Path.unlink])
@pytest.mark.parametrize(
    "name", ["shards/00003.zarr.zip", "sketch.zarr.zip", "vocabulary.zarr.zip", "skipped.jsonl"]
)
def test_what_is_not_as_listed_never_gets_its_name(remote, tmp_path, name, spoil):
    good = (remote / name).read_bytes()
    spoil(remote / name)
    out = tmp_path / "out"
    with pytest.raises(CachekdError, match="not the one that the manifest lists") as caught:
        pull_cache(f"file://{remote}", out)
    assert caught.value.where.endswith(name)
    assert not (out / name).exists()
    assert not (out / "manifest.json").exists()
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < 1_000_000
    (remote / name).write_bytes(good)
    pulled = pull_cache(f"file://{remote}", out)
    assert pulled.fetched + pulled.kept == 6
    assert verify_files(out) == []


def _rename(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda path: reseal(path / "manifest.json", change)


@pytest.mark.parametrize("name", ["../00000.zarr.zip", "/etc/passwd", "00000.zarr.zip/../../x", "..", ""])
@pytest.mark.parametrize("field", ["shards", "sketches"])
def test_names_cannot_lead_out_of_the_folder(remote, tmp_path, field, name):
    reseal(remote / "manifest.json", lambda values: values[field][0].update(name=name))
    with pytest.raises(CachekdError, match=r"manifest.json cannot be read[\s\S]*pattern") as caught:
        pull_cache(f"file://{remote}", tmp_path / "out")
    assert caught.value.where == f"file://{remote}/manifest.json"
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_is_none(remote, tmp_path):
    (remote / "manifest.json").write_bytes(b'{"format_version": 1')
    with pytest.raises(CachekdError, match=r"cannot be read"):
        pull_cache(f"file://{remote}", tmp_path / "out")
    with (remote / "manifest.json").open("wb") as stream:
        stream.truncate(2**40)  # sparse: read into memory it would not fit
    with pytest.raises(CachekdError, match=r"1,099,511,627,776 bytes"):
        pull_cache(f"file://{remote}", tmp_path / "out")


def test_a_finished_pull_is_mended(remote, tmp_path):
    out = tmp_path / "out"
    pull_cache(f"file://{remote}", out)
    flip(out / "shards/00000.zarr.zip", 100)
    (out / "sketch.zarr.zip").unlink()
    pulled = pull_cache(f"file://{remote}", out)
    assert (pulled.fetched, files_of(out)) == (2, without_card(files_of(remote)))
    assert pull_cache(f"file://{remote}", out).fetched == 0


def test_some_shards_are_a_cache_of_their_own(remote, skipping_cache, tmp_path):
    whole, parts = Manifest.load(skipping_cache), []
    for place, (spec, numbers) in enumerate((("0,2", [0, 2]), (" 1-1 ", [1]))):
        parts.append(tmp_path / f"part{place}")
        pulled = pull_cache(f"file://{remote}", parts[-1], shards=spec)
        assert pulled.manifest == Manifest.load(parts[-1])
        assert pulled.manifest.shards == [whole.shards[number] for number in numbers]
        assert pulled.manifest.sources == whole.sources
        assert pulled.manifest.fidelity.tokens == sum(
            whole.shards[number].fidelity.tokens for number in numbers
        )
        assert verify_files(parts[-1]) == []
        assert_same_samples(parts[-1], skipping_cache)
    assert not {*LogitCache(parts[0])} & {*LogitCache(parts[1])}
    merge_caches(parts, tmp_path / "merged")
    assert {*LogitCache(tmp_path / "merged")} == {*LogitCache(skipping_cache)}
    assert_same_samples(tmp_path / "merged", skipping_cache)


@pytest.mark.parametrize("spec", ["3", "0-3", "2-1", "-1", "a", "", "0;1", "1,,2", "9" * 30])
def test_shards_that_are_not_there(remote, tmp_path, spec):
    with pytest.raises(CachekdError, match=r"no list of this cache's shards[\s\S]*0 to 2"):
        pull_cache(f"file://{remote}", tmp_path / "out", shards=spec)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(remote, skipping_cache, tmp_path):
    other = copied(skipping_cache, tmp_path / "other")
    reseal(other / "manifest.json", lambda values: values["teacher"].update(name="another"))
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    part = tmp_path / "part"
    pull_cache(f"file://{remote}", part, shards="0")
    for folder in (other, notes, part, notes / "mine.txt"):
        before = files_of(folder) if folder.is_dir() else folder.read_bytes()
        with pytest.raises(CachekdError, match="holds"):
            pull_cache(f"file://{remote}", folder)
        assert before == (files_of(folder) if folder.is_dir() else folder.read_bytes())


def test_a_full_disk_is_seen_before_anything_is_fetched(remote, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(CachekdError, match=r"no room[\s\S]*10 bytes"):
        pull_cache(f"file://{remote}", tmp_path / "out")
    assert not any((tmp_path / "out" / "shards").iterdir())


def test_a_published_cache_is_read_by_its_address(watched, skipping_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEKD_HOME", str(tmp_path / "home"))
    push_cache(skipping_cache, "watched:///org/c")
    cache = LogitCache(local_folder("watched:///org/c"))
    assert cache.path.parent == tmp_path / "home"
    assert_same_samples(cache.path, skipping_cache)
    for name in watched.find("/org/c/shards"):
        watched.rm_file(name)  # they are here, and verified
    assert local_folder("watched:///org/c") == cache.path
    manifest = copied(skipping_cache, tmp_path / "other") / "manifest.json"
    reseal(manifest, lambda values: values["teacher"].update(name="another"))
    watched.pipe_file("/org/c/manifest.json", manifest.read_bytes())
    with pytest.raises(CachekdError, match="no file"):
        local_folder("watched:///org/c")  # another cache: the one that is here is not taken for it
    assert LogitCache(cache.path).manifest == cache.manifest


def test_a_fetched_cache_that_has_changed_is_not_used(watched, skipping_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEKD_HOME", str(tmp_path / "home"))
    push_cache(skipping_cache, "watched:///org/c")
    folder = local_folder("watched:///org/c")
    whole = files_of(folder)
    for name in published(folder).keys() - {"manifest.json"}:
        for content in (whole[name][:-1], None):
            file = folder / name
            file.unlink() if content is None else file.write_bytes(content)
            with pytest.raises(CachekdError, match="a fetched file") as caught:
                local_folder("watched:///org/c")
            assert f"where: {file}" in str(caught.value)
            assert f"expected: {len(whole[name]):,} bytes" in str(caught.value)
            (fix,) = re.findall(r"try: cachekd (pull .+)", str(caught.value))
            assert CliRunner().invoke(app, shlex.split(fix)).exit_code == 0
            assert files_of(local_folder("watched:///org/c")) == whole
    reseal(folder / "manifest.json", lambda values: values["shards"][0].update(entries=1))
    with pytest.raises(CachekdError, match="no longer what is published"):
        open_bound("watched:///org/c")


def test_training_takes_an_address(
    hub, cache_path, student_path, teacher_path, data_path, tmp_path, monkeypatch
):
    from cachekd.config import TrainConfig
    from cachekd.train.open import make_trainer

    monkeypatch.setenv("CACHEKD_HOME", str(tmp_path / "home"))
    push_cache(cache_path, REPO)
    config = TrainConfig(
        student=str(student_path),
        teacher=str(teacher_path),
        data=data_path,
        cache=f"hf://datasets/{REPO}",
        out=tmp_path / "run",
    )
    assert config.cache == f"hf://datasets/{REPO}"  # a Path would have made it hf:/datasets
    trainer = make_trainer(config, tmp_path / "t")
    assert trainer.train_dataset.cache.path.parent == tmp_path / "home"
    assert trainer.train_dataset[0].targets is not None


@pytest.mark.parametrize("address", ["caches/a/b", "cache", "hf://org/name", "hf://datasets/x"])
def test_addresses_that_are_none(skipping_cache, address):
    with pytest.raises(CachekdError, match=r"no address of a cache[\s\S]*org/name"):
        push_cache(skipping_cache, address)


@pytest.mark.parametrize(
    "command",
    ["inspect C", "peek C", "verify C", "select C --list", "merge C C -o {}", "recompress C {} --top-k 2"]
    + ["export C {} --to parquet", "status C", "push C org/name"],
)
@pytest.mark.parametrize("address", ["hf://datasets/org/name", "file:///data/cache"])
def test_commands_that_need_a_folder_say_to_pull_first(command, address, tmp_path):
    arguments = [part.format(tmp_path / "out") if part != "C" else address for part in command.split()]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, CachekdError)
    assert f"cachekd pull {address} FOLDER" in str(error)


def test_a_cache_is_not_made_at_an_address(skipping_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CachekdError, match=r"cachekd push FOLDER s3://bucket/c"):
        recompress(skipping_cache, Path("s3://bucket/c"), top_k=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pub/plain", "./new", "pub"])
def test_a_path_of_this_disk_is_one(skipping_cache, tmp_path, monkeypatch, name):
    """`push` asked the hub for a repository `pub/plain`, beside a folder `pub`."""
    monkeypatch.setattr("cachekd.hub.hub_store.HubStore.__init__", None)  # asking it would fail
    monkeypatch.chdir(tmp_path)
    Path("pub").mkdir()
    assert push_cache(skipping_cache, name).url == f"file://{Path(name).resolve()}"
    assert Manifest.load(Path(name)) == Manifest.load(skipping_cache)
    assert pull_cache(name, tmp_path / "out").manifest == Manifest.load(skipping_cache)
    assert len(open_bound(name)) == len(LogitCache(skipping_cache))
    with pytest.raises(CachekdError, match="only repositories of the hub have revisions"):
        push_cache(skipping_cache, name, revision="x")


def test_a_name_that_no_path_begins_is_the_hubs(hub, skipping_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CACHEKD_HOME", str(tmp_path / "home"))
    push_cache(skipping_cache, REPO)
    assert open_bound(REPO).path.parent == tmp_path / "home"
    Path(REPO).parent.mkdir()
    with pytest.raises(CachekdError, match="not a cache") as caught:
        open_bound(REPO)
    assert str(caught.value.found).startswith(f"no {Path(REPO).name!r} in {Path(REPO).parent}/")
    assert open_bound(f"hf://datasets/{REPO}").path.parent == tmp_path / "home"


def test_a_missing_client_and_an_unknown_scheme_are_explained(tmp_path):
    with pytest.raises(CachekdError, match="cannot be used"):
        pull_cache("nonsense://x", tmp_path / "out")
    if not fsspec.available_protocols or "s3" in fsspec.available_protocols():
        try:
            import s3fs  # noqa: F401
        except ImportError:
            with pytest.raises(CachekdError, match=r"package is missing[\s\S]*s3fs"):
                pull_cache("s3://bucket/cache", tmp_path / "out")


def test_ctrl_c_says_how_to_go_on(watched, skipping_cache, monkeypatch):
    monkeypatch.setattr(WatchedFileSystem, "failure", KeyboardInterrupt)
    WatchedFileSystem.writes_left = 3
    done = CliRunner().invoke(app, ["push", str(skipping_cache), "watched:///c"])
    assert done.exit_code == 130
    assert "the same command goes on" in done.stderr
    WatchedFileSystem.writes_left = None
    done = CliRunner().invoke(app, ["push", str(skipping_cache), "watched:///c", "--json"])
    assert json.loads(done.stdout)["skipped"] == 1


def test_the_card(skipping_cache):
    manifest = Manifest.load(skipping_cache)
    text = dataset_card(manifest, "org/my-cache", "cc-by-4.0")
    _, header, body = text.split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["license"] == "cc-by-4.0"
    assert {"switch-kd", "cachekd"} <= {*values["tags"]}
    assert values["size_categories"] == ["n<1K"]
    for fact in (
        manifest.teacher.model_type,
        f"| samples | {manifest.samples:,} |",
        f"| answer tokens | {manifest.tokens:,} |",
        f"{manifest.size / 1e6:,.2f} MB in 3 shards",
        f"KL {manifest.fidelity.kl:.4g} nats",
        manifest.teacher.weights_sha256,
        "hf://datasets/org/my-cache",
        "2604.14629",
    ):
        assert fact in body, fact
    assert values["license"] in body
    unknown = dataset_card(manifest, "s3://bucket/my-cache/", None)
    assert "license: unknown" in unknown
    assert "**Unknown**" in unknown
    assert "--cache s3://bucket/my-cache" in unknown
    assert unknown.startswith("---\n")


def test_a_card_shows_names_as_they_are(skipping_cache):
    manifest = Manifest.load(skipping_cache)
    teacher = manifest.teacher.model_copy(update={"name": "a|b\n\n# <script>`x`"})
    text = dataset_card(manifest.model_copy(update={"teacher": teacher}), "org/c", None)
    assert r"| teacher | a\|b # \<script\>\`x\` (llava, float32, " in text


def test_the_commands(watched, skipping_cache, tmp_path):
    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    done = invoke("push", skipping_cache, "watched:///c", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["uploaded"] == 8
    done = invoke("push", skipping_cache, "watched:///d")
    assert "licence is unknown" in done.stdout
    assert "8 files uploaded" in done.stdout
    done = invoke("pull", "watched:///c", tmp_path / "out", "--shards", "1-2", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["shards"], found["fetched"], found["kept"]) == (2, 5, 0)
    assert found["samples"] == len(LogitCache(tmp_path / "out"))
    done = invoke("pull", "watched:///c", tmp_path / "all")
    assert "3 shards" in done.stdout
    assert isinstance(invoke("pull", "nothing", tmp_path / "x").exception, CachekdError)
