"""Stores that fail, lie or fall silent, processes that are killed, and two that push to one address."""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

from cachekd.cache import Manifest, verify_files
from cachekd.cache.recompress import recompress
from cachekd.errors import CachekdError
from cachekd.hub import local_folder, pull_cache, push_cache
from cachekd.hub.push import CLAIM_FILE
from cachekd.lock import LOCK_FILE
from cachekd_cli.main import app
from caches import copied, files_of, reseal
from flaky_server import FlakyServer, falling_silent, serving
from hub_server import HubServer

KILLS = int(os.environ.get("CACHEKD_KILLS", "3"))
BIG = "shards/00000.zarr.zip"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries."""
    monkeypatch.setattr("cachekd.hub.reach._WAITS", (0.01, 0.01, 0.01))


def published(path: Path) -> dict[str, bytes]:
    names = [file.name for file in Manifest.load(path).files]
    return {name: (path / name).read_bytes() for name in [*names, "manifest.json"]}


@pytest.fixture(scope="module")
def other_cache(skipping_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same data, with shards of the same names and other content."""
    out = tmp_path_factory.mktemp("other") / "cache"
    recompress(skipping_cache, out, top_k=2)
    return out


@pytest.fixture
def big_cache(skipping_cache: Path, tmp_path: Path) -> Path:
    """One of its files is larger than fsspec's block of 5 MB: what is after a zip's end is not looked at."""
    path = copied(skipping_cache, tmp_path / "big")
    shard = path / BIG
    shard.write_bytes(shard.read_bytes() + random.Random(1).randbytes(7_000_000))
    content = shard.read_bytes()
    change = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reseal(path / "manifest.json", lambda values: values["shards"][0].update(change))
    return path


@pytest.fixture
def flaky(big_cache: Path) -> Iterator[FlakyServer]:
    with serving(big_cache) as server:
        yield server


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a new bucket."""
    from moto.server import ThreadedMotoServer  # not there where only the tests of a GPU run

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{secrets.token_hex(4)}"  # all of moto's servers in a process share their state
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    yield f"s3://{bucket}"
    server.stop()


def at(url: str) -> dict[str, bytes]:
    """What is there, beside the card."""
    fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    files = {name.removeprefix(f"{root}/"): fs.cat_file(name) for name in fs.find(root)}
    files.pop("README.md", None)
    return files


def test_a_web_server_without_ranges(flaky, big_cache, tmp_path):
    seen: list[int] = []
    pulled = pull_cache(flaky.url, tmp_path / "out", progress=seen.append)
    assert files_of(tmp_path / "out") == published(big_cache)
    assert sum(seen) == pulled.bytes
    assert len(seen) > 20  # as the bytes come


def test_what_a_killed_pull_left_is_no_hindrance(flaky, big_cache, tmp_path):
    out = tmp_path / "out"
    flaky.faults[BIG] = [404] * 99
    with pytest.raises(CachekdError, match="no file"):
        pull_cache(flaky.url, out)
    flaky.faults.clear()
    part = out / ".pull" / BIG
    part.write_bytes(b"?" * 3_000_000)  # as a kill in the middle of it leaves it
    flaky.got.clear()
    pull_cache(flaky.url, out)
    assert files_of(out) == published(big_cache)
    assert f"/{BIG}" in flaky.got


@pytest.mark.parametrize("left", [LOCK_FILE, f".pull/{BIG}"])
def test_what_a_pull_left_that_was_killed_as_it_began(flaky, big_cache, tmp_path, left):
    out = tmp_path / "out"
    (out / left).parent.mkdir(parents=True)
    (out / left).write_bytes(b"?")
    pull_cache(flaky.url, out)
    assert files_of(out) == published(big_cache)


def test_of_two_pulls_into_one_folder_one_is_refused_and_of_two_readers_one_waits(
    flaky, big_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("CACHEKD_HOME", str(tmp_path / "home"))
    flaky.pause = 0.01  # about a second for the big file
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(local_folder, flaky.url) for _ in range(2)]
        while not flaky.got.count(f"/{BIG}"):
            time.sleep(0.01)
        (folder,) = (path for path in (tmp_path / "home").iterdir())
        with pytest.raises(CachekdError, match="another process is fetching into this folder") as caught:
            pull_cache(flaky.url, folder)
        assert f"process {os.getpid()} on" in caught.value.found
        assert [call.result() for call in both] == [folder, folder]
    assert flaky.got.count(f"/{BIG}") == 1
    assert files_of(folder) == published(big_cache)


@pytest.mark.parametrize("fault", [500, 503, 429, 404, "drop"])
@pytest.mark.parametrize("name", [BIG, "sketch.zarr.zip", "manifest.json"])
@pytest.mark.parametrize("lengths", [True, False])
def test_what_passes_is_tried_again(flaky, big_cache, tmp_path, name, fault, lengths):
    if name == "manifest.json" and fault == "drop" and not lengths:
        pytest.skip("nothing says how long a manifest is; that it is cut short is seen as it is read")
    flaky.lengths = lengths
    # Each file is asked for with one GET.
    flaky.faults[name] = [fault, fault]
    seen: list[int] = []
    pulled = pull_cache(flaky.url, tmp_path / "out", progress=seen.append)
    assert flaky.faults[name] == []
    assert files_of(tmp_path / "out") == published(big_cache)
    assert sum(seen) == pulled.bytes


@pytest.mark.parametrize(
    ("fault", "said"),
    [(500, "500"), (503, "503"), (403, "403"), ("drop", "Error"), (404, "no file"), ("endless", "more than")],
)
@pytest.mark.parametrize("lengths", [True, False])
def test_what_stays_is_called_by_its_name(flaky, tmp_path, fault, said, lengths):
    flaky.lengths = lengths
    flaky.faults[BIG] = [fault] * 99
    if fault == "endless" and lengths:
        flaky.faults[BIG] = ["endless"] * 99  # HEAD tells the right size, the body does not end
    out = tmp_path / "out"
    with pytest.raises(CachekdError) as caught:
        pull_cache(flaky.url, out)
    assert said in str(caught.value.found)
    assert caught.value.where == f"{flaky.url}/{BIG}"
    if fault != 404:
        assert "no file" not in str(caught.value)
    assert not (out / "manifest.json").exists()
    assert not (out / BIG).exists()


def test_an_endless_body_is_stopped(flaky, tmp_path):
    flaky.faults["sketch.zarr.zip"] = ["endless"] * 99
    most = [0]
    out = tmp_path / "out"

    def measure(done: int) -> None:
        file = out / ".pull" / "sketch.zarr.zip"
        most[0] = max(most[0], file.stat().st_size if file.exists() else 0)

    with pytest.raises(CachekdError, match="not the one that the manifest lists"):
        pull_cache(flaky.url, out, progress=measure)
    assert most[0] <= 10_000_000
    assert flaky.sent < 50_000_000


def test_a_manifest_without_end_is_stopped(flaky, tmp_path, monkeypatch):
    monkeypatch.setattr("cachekd.hub.pull.MOST_JSON", 1_000_000)
    flaky.faults["manifest.json"] = ["endless"] * 99
    with pytest.raises(CachekdError, match=r"1,000,000 bytes at most[\s\S]*more than"):
        pull_cache(flaky.url, tmp_path / "out")


@pytest.mark.parametrize("fault", ["silent", "stall"])
@pytest.mark.parametrize("name", ["manifest.json", BIG])
def test_a_stall_is_given_up(flaky, tmp_path, name, fault):
    flaky.faults[name] = [fault]
    start = time.monotonic()
    out = tmp_path / "out"
    error = CliRunner().invoke(app, ["pull", flaky.url, str(out), "--timeout", "1"]).exception
    assert isinstance(error, CachekdError)
    assert "stalled" in str(error)
    assert "every 1 seconds" in str(error)
    assert "--timeout" in str(error)
    assert time.monotonic() - start < 30
    flaky.go_on.set()
    assert pull_cache(flaky.url, out).kept >= 0


def test_a_stall_of_the_hub_is_given_up(hub, skipping_cache, tmp_path):
    push_cache(skipping_cache, "org/cache")
    hub.stall_after = 1000
    start = time.monotonic()
    with pytest.raises(CachekdError, match=r"stalled[\s\S]*--timeout"):
        pull_cache("org/cache", tmp_path / "out", timeout=0.3)
    assert time.monotonic() - start < 30
    hub.go_on.set()
    pull_cache("org/cache", tmp_path / "out")
    assert files_of(tmp_path / "out") == published(skipping_cache)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/repos/create"),
        ("GET", "/api/datasets/org/cache"),
        ("GET", "/api/datasets/org/cache/tree"),
        ("POST", "/api/datasets/org/cache/preupload"),
        ("POST", "/datasets/org/cache.git/info/lfs"),
        ("PUT", "/cdn"),
        ("POST", "/api/datasets/org/cache/commit"),
        ("HEAD", "/datasets/org/cache/resolve"),
        ("GET", "/datasets/org/cache/resolve"),
        ("GET", "/cdn"),
    ],
)
def test_the_hub_fails_once(hub, skipping_cache, tmp_path, method, path):
    hub.failures.add((method, path))
    push_cache(skipping_cache, "org/cache")
    assert _tree(hub, "org/cache") == published(skipping_cache)
    pull_cache("org/cache", tmp_path / "out")
    assert hub.failures == set()
    assert files_of(tmp_path / "out") == published(skipping_cache)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        yield


@pytest.mark.parametrize("command", ["push", "pull"])
def test_a_silent_s3_is_given_up(silent, skipping_cache, tmp_path, command):
    paths = [str(skipping_cache), "s3://bucket/c"] if command == "push" else ["s3://bucket/c", str(tmp_path)]
    start = time.monotonic()
    error = CliRunner().invoke(app, [command, *paths, "--timeout", "1"]).exception
    assert isinstance(error, CachekdError)
    assert error.problem.startswith("the connection stalled")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("silent_in", ["get_object", "put_object", "upload_part"])
def test_an_s3_that_falls_silent_is_given_up(s3, skipping_cache, tmp_path, monkeypatch, silent_in):
    """In the middle of a body that it sends; and after one that it took, whole or in parts."""
    if silent_in == "upload_part":
        monkeypatch.setattr("cachekd.hub.fsspec_store._BLOCK", 1000)
    if silent_in == "get_object":
        push_cache(skipping_cache, f"{s3}/c")
    call = pull_cache if silent_in == "get_object" else push_cache
    paths = (f"{s3}/c", tmp_path / "out") if silent_in == "get_object" else (skipping_cache, f"{s3}/c")
    start = time.monotonic()
    with falling_silent(os.environ["AWS_ENDPOINT_URL"], silent_in) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(CachekdError, match=r"stalled[\s\S]*every 0.3 seconds[\s\S]*--timeout"):
            call(*paths, timeout=0.3)
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_a_process_that_gives_up_ends(silent, tmp_path):
    command = [sys.executable, "-m", "cachekd_cli", "pull", "s3://bucket/c", str(tmp_path), "--timeout", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "stalled" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_pushed_to_a_web_server(flaky, skipping_cache):
    with pytest.raises(CachekdError, match="a web server can only be read"):
        push_cache(skipping_cache, flaky.url)


def test_to_s3_and_back(s3, skipping_cache, other_cache, tmp_path):
    seen: list[int] = []
    pushed = push_cache(skipping_cache, f"{s3}/c", progress=seen.append)
    assert at(f"{s3}/c") == published(skipping_cache)
    assert pushed.uploaded == 8
    again = push_cache(skipping_cache, f"{s3}/c")
    assert (again.uploaded, again.skipped) == (0, 8)
    pull_cache(f"{s3}/c", tmp_path / "out")
    assert files_of(tmp_path / "out") == published(skipping_cache)
    with pytest.raises(CachekdError, match="another file under this name"):
        push_cache(other_cache, f"{s3}/c")
    assert at(f"{s3}/c") == published(skipping_cache)
    with pytest.raises(CachekdError, match="no such bucket"):
        push_cache(skipping_cache, "s3://mistyped/c")
    with pytest.raises(CachekdError, match="not a cache"):
        pull_cache(f"{s3}/nothing", tmp_path / "nothing")


def _tree(hub: HubServer, repo: str) -> dict[str, bytes]:
    tree = dict(hub.repos[repo].tree())
    return {name: tree[name] for name in tree if name not in ("README.md", ".gitattributes")}


@pytest.mark.parametrize(
    ("store", "turns"), [("s3", 1), pytest.param("s3", 3, marks=pytest.mark.slow), ("file", 3), ("hub", 3)]
)
def test_two_caches_are_pushed_to_one_address(
    store, turns, request, hub, skipping_cache, other_cache, tmp_path
):
    caches, s3 = (skipping_cache, other_cache), store == "s3" and request.getfixturevalue("s3")
    for turn in range(turns):
        address = {"s3": f"{s3}/{turn}", "file": f"file://{tmp_path}/{turn}", "hub": f"org/c{turn}"}[store]
        gate, results = threading.Barrier(2), [None, None]

        def push(place: int, address: str = address, gate: Any = gate, results: list[Any] = results) -> None:
            gate.wait()
            try:
                results[place] = push_cache(caches[place], address)
            except CachekdError as error:
                results[place] = error

        threads = [threading.Thread(target=push, args=(place,)) for place in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        won = [place for place in (0, 1) if not isinstance(results[place], CachekdError)]
        assert len(won) == 1, results
        there = _tree(hub, address) if store == "hub" else at(address)
        wanted = published(caches[won[0]])
        assert there == wanted, store
        lost = str(results[1 - won[0]])
        assert "another cache is being pushed" in lost or "another file under this name" in lost


def test_the_same_cache_is_pushed_by_two(skipping_cache, tmp_path):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(push_cache(skipping_cache, f"file://{tmp_path}/c")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert at(f"file://{tmp_path}/c") == published(skipping_cache)


def test_a_claim_says_whose_it_is_and_its_own_push_goes_on(
    skipping_cache, other_cache, tmp_path, monkeypatch
):
    address = f"file://{tmp_path}/c"
    with monkeypatch.context() as patch:
        patch.setattr("cachekd.hub.fsspec_store.FsspecStore._upload", _cut)
        with pytest.raises(KeyboardInterrupt):
            push_cache(skipping_cache, address)
    assert (tmp_path / "c" / CLAIM_FILE).exists()
    with pytest.raises(CachekdError, match="another cache is being pushed") as caught:
        push_cache(other_cache, address)
    assert f"process {os.getpid()}" in caught.value.found
    assert f"{address}/{CLAIM_FILE}" in caught.value.fix
    push_cache(skipping_cache, address)
    assert at(address) == published(skipping_cache)


def _cut(*_args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_changes_about_the_manifest_is_seen(skipping_cache, tmp_path, monkeypatch, when):
    from cachekd.hub.fsspec_store import FsspecStore

    put_first = FsspecStore.put_first

    def spoiling(store: FsspecStore, name: str, content: bytes) -> bool:
        if name != "manifest.json":
            return put_first(store, name, content)
        made = when == "before" or put_first(store, name, content)
        (tmp_path / "c" / BIG).write_bytes(b"other")
        return made if when == "after" else put_first(store, name, content)

    monkeypatch.setattr(FsspecStore, "put_first", spoiling)
    with pytest.raises(CachekdError, match="another file under this name"):
        push_cache(skipping_cache, f"file://{tmp_path}/c")
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert not (tmp_path / "c" / CLAIM_FILE).exists()


def test_what_is_removed_about_the_manifest_is_sent_again(skipping_cache, tmp_path, monkeypatch):
    from cachekd.hub.fsspec_store import FsspecStore

    put_first, times = FsspecStore.put_first, []

    def removing(store: FsspecStore, name: str, content: bytes) -> bool:
        made = put_first(store, name, content)
        if name == "manifest.json":
            times.append((tmp_path / "c" / BIG).unlink())
        return made

    monkeypatch.setattr(FsspecStore, "put_first", removing)
    push_cache(skipping_cache, f"file://{tmp_path}/c")
    assert len(times) == 1
    assert at(f"file://{tmp_path}/c") == published(skipping_cache)


def test_dead_pushers_leftovers_are_removed(skipping_cache, tmp_path):
    from cachekd.atomic import _HERE

    folder = tmp_path / "c" / "shards"
    folder.mkdir(parents=True)
    dead = folder / f".00000.zarr.zip.tmp-{_HERE}-999999999-00000000"
    alive = folder / f".00000.zarr.zip.tmp-{_HERE}-{os.getpid()}-00000000"
    elsewhere = folder / ".00000.zarr.zip.tmp-other.1-5-00000000"
    old = folder / ".00001.zarr.zip.tmp-other.1-5-00000000"
    for path in (dead, alive, elsewhere, old):
        path.write_bytes(b"part")
    os.utime(old, (0, 0))
    push_cache(skipping_cache, f"file://{tmp_path}/c")
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == {
        alive.name,
        elsewhere.name,
    }


def _killed_at_random(
    command: list[str], rng: random.Random, environment: dict[str, str], most: float
) -> bool:
    """Whether the kill came before its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", command[0], *command[1:]], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()  # it has imported what it needs
    time.sleep(rng.uniform(0, most))
    process.kill()
    process.stdout.close()
    return process.wait() != 0


_PULL = "import sys; from cachekd.hub import pull_cache; print(flush=True); pull_cache(*sys.argv[1:3])"
_PUSH = "import sys; from cachekd.hub import push_cache; print(flush=True); push_cache(*sys.argv[1:3])"


@pytest.mark.slow
def test_killed_pulls_over_http_go_on(flaky, big_cache, tmp_path):
    rng, killed = random.Random(16), 0
    for turn in range(KILLS):
        out = tmp_path / f"out{turn}"
        flaky.pause = 0.01  # about a second for the big file
        killed += _killed_at_random([_PULL, flaky.url, str(out)], rng, dict(os.environ), 1.2)
        if (out / "manifest.json").exists():
            assert files_of(out) == published(big_cache)
        flaky.pause = 0
        pull_cache(flaky.url, out)
        assert files_of(out) == published(big_cache)
    assert killed >= KILLS / 2


@pytest.mark.slow
@pytest.mark.parametrize("store", ["s3", "file", "hub"])
def test_killed_pushes_go_on(store, request, hub, skipping_cache, tmp_path):
    rng, killed = random.Random(17), 0
    s3 = store == "s3" and request.getfixturevalue("s3")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for turn in range(KILLS):
        address = {"s3": f"{s3}/{turn}", "file": f"file://{tmp_path}/{turn}", "hub": f"org/c{turn}"}[store]
        most = {"s3": 0.8, "file": 0.15, "hub": 0.8}[store]
        killed += _killed_at_random([_PUSH, str(skipping_cache), address], rng, environment, most)
        there: Callable[[], dict[str, bytes]] = lambda: (  # noqa: E731
            _tree(hub, address) if store == "hub" else at(address)  # noqa: B023
        )
        if not (store == "hub" and address not in hub.repos):
            found = there() if store != "file" or (tmp_path / str(turn)).exists() else {}
            assert "manifest.json" not in found or found.items() >= published(skipping_cache).items()
        push_cache(skipping_cache, address)
        assert there() == published(skipping_cache)
        pull_cache(address, tmp_path / f"out{turn}")
        assert verify_files(tmp_path / f"out{turn}") == []
    assert killed >= KILLS / 3
