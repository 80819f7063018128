"""Caches of many samples and shards: what is kept in memory, how often things are done, the same results."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cachekd.cache import LogitCache, TokenTargets, key_index, reader
from cachekd.cache.key_index import KeyIndex, RenamedKeys, near_keys
from cachekd.cache.shard import read_shard
from cachekd.cache.subset import choose_samples, filter_rows, filter_samples, is_by_sample, sample_table
from cachekd.errors import CachekdError
from cachekd.report.peek import choose
from cachekd_cli.derive import print_samples
from cachekd_cli.main import app
from caches import ROOT, write_cache

PER_SHARD = 200


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> list[Path]:
    """Of 1,000 samples, and of five times as many in shards of the same size."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from many_shards import made
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("many")
    return [made(folder, count, count // PER_SHARD, 2) for count in (1_000, 5_000)]


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python and NumPy had at the most, beyond what there was."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- the index of keys

SHARDS = st.lists(
    st.lists(st.sampled_from([f"k{n}" for n in range(9)] + ["", "é", "\r"]), min_size=1), min_size=1
)


def as_dict(shards: list[list[str]]) -> dict[str, tuple[int, int]]:
    """The index as it was: what the arrays must agree with."""
    return {
        key: (number, position) for number, keys in enumerate(shards) for position, key in enumerate(keys)
    }


@settings(max_examples=60, deadline=None)
@given(shards=SHARDS, alike=st.booleans())
def test_the_index_is_a_dict_whatever_the_hashes(shards, alike):
    with pytest.MonkeyPatch.context() as patch:
        if alike:  # as if all keys of a length had one hash
            patch.setattr(key_index, "hash", len, raising=False)
        index, expected = KeyIndex(shards), as_dict(shards)
        assert list(index) == list(expected)
        assert len(index) == len(expected)
        for key in [*expected, "k", "nowhere", "k0\nk1", "\ud800", 3, None]:
            assert index.find(key) == expected.get(key)
        for number, keys in enumerate(shards):
            assert index.names(number) == [(key, position) for position, key in enumerate(keys)]


@settings(max_examples=60, deadline=None)
@given(shards=SHARDS, data=st.data())
def test_a_renamed_index_is_a_dict_too(shards, data):
    old = as_dict(shards)
    without = data.draw(st.sets(st.sampled_from([*old, "k0", "x"])))
    keys = data.draw(st.dictionaries(st.sampled_from([*old, "new", "k1"]), st.sampled_from(list(old))))
    places = {new: old[key] for new, key in keys.items()}
    index = RenamedKeys(KeyIndex(shards), places, without)
    expected = {key: place for key, place in old.items() if key not in without} | places
    assert list(index) == list(expected)
    assert len(index) == len(expected)
    for key in [*old, *keys, *without, "nowhere", 3]:
        assert index.find(key) == expected.get(key)
    for number in range(len(shards)):
        names = [(key, place[1]) for key, place in expected.items() if place[0] == number]
        found = index.names(number)
        assert sorted(found) == sorted(names)
        assert [position for _, position in found] == sorted(position for _, position in names)


def test_a_key_that_is_there_a_thousand_times_is_found_at_once(monkeypatch):
    """Or a hostile cache would take the square of its samples to open."""
    read = []
    real = KeyIndex._text
    monkeypatch.setattr(KeyIndex, "_text", lambda index, sample: read.append(sample) or real(index, sample))
    index = KeyIndex([["same"] * 500] * 4)
    assert (len(index), list(index), index.find("same")) == (1, ["same"], (3, 499))
    assert len(read) <= 2 * 2_000


def test_another_process_hashes_otherwise_and_finds_the_same(tmp_path):
    index = KeyIndex([[f"{shard}/{n}" for n in range(50)] for shard in range(4)])
    (tmp_path / "index").write_bytes(pickle.dumps(index))
    code = (
        "import pickle, sys; index = pickle.load(open(sys.argv[1], 'rb'));"
        "print([index.find(key) for key in index] == [(s, n) for s in range(4) for n in range(50)])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "index")]
    env = os.environ | {"PYTHONHASHSEED": "5"}
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_key_takes_its_text_and_a_few_bytes(caches):
    cache = LogitCache(caches[1])
    shards = [[key for key, _ in cache.names(number)] for number in range(len(cache.manifest.shards))]
    keys = [key for shard in shards for key in shard]
    text = sum(len(key) + 1 for key in keys)
    tracemalloc.start()
    try:
        index = KeyIndex(shards)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < text + 20 * len(keys)  # a dict: 190 and the text
    assert len(pickle.dumps(index)) < text + 100 * len(shards)
    cache = LogitCache(caches[1])
    without_keys = len(pickle.dumps(cache.manifest))
    assert len(pickle.dumps(cache)) < without_keys + text + 100 * len(shards)


# ---- a key that is not there


def test_looking_for_a_missing_key_is_bounded(caches, monkeypatch):
    compared = []
    closest = difflib.get_close_matches

    def counted(word, possibilities, *args, **options):
        possibilities = list(possibilities)
        compared.append(len(possibilities))
        return closest(word, possibilities, *args, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    cache = LogitCache(caches[1])
    with pytest.raises(CachekdError, match="such as coco/train/000"):
        cache["something else"]
    with pytest.raises(CachekdError, match="one of its 5,000 keys"):
        cache["y" * 100_000]
    assert compared
    assert max(compared) <= 100


@pytest.mark.parametrize(
    "key",
    [
        "coco/train/0000017",
        "coco/train/000000177",
        "coco/trian/00000017",
        "coco/train/x0000017",
        "coc/train/00000017",
    ],
)
def test_a_typing_error_is_seen(caches, key):
    with pytest.raises(CachekdError) as caught:
        LogitCache(caches[0])[key]
    assert "coco/train/00000017" in str(caught.value)


def test_near_keys_are_known():
    known = {"a/1", "b/1", "longer"}
    assert set(near_keys("c/1", {"a/1", "b/1", "c/2"}, [])) == {"c/2"}
    assert near_keys("b/1x", known, known) == ["b/1"]
    assert near_keys("a/11", known, []) == ["a/1"]
    assert near_keys("", known, ["longer"]) == ["longer"]
    assert near_keys("zzz", known, []) == []


# ---- reading


def test_what_is_kept_is_not_counted_again_at_each_read(tmp_path, monkeypatch):
    cache = LogitCache(write_cache(tmp_path / "c", 40, shard_tokens=1))
    asked = []
    real = TokenTargets.nbytes.fget
    monkeypatch.setattr(TokenTargets, "nbytes", property(lambda self: asked.append(1) or real(self)))
    for key in cache:
        cache.sparse(key)
    assert len(cache._decoded) == 40
    assert len(asked) <= 40


def test_no_more_is_kept_than_is_allowed(tmp_path, monkeypatch):
    cache = LogitCache(write_cache(tmp_path / "c", 20, shard_tokens=1))
    most = 3 * cache.sparse(next(iter(cache))).nbytes
    monkeypatch.setattr(reader, "_KEPT_BYTES", most)
    for key in [*cache, *list(cache)[::3]]:
        cache.sparse(key)
        kept = sum(shard.targets.nbytes for shard in cache._decoded.values())
        assert kept == cache._kept_bytes
        assert kept <= most or len(cache._decoded) == 1
    assert pickle.loads(pickle.dumps(cache))._kept_bytes == 0


def test_a_member_that_is_not_what_the_directory_says_is_refused(tmp_path):
    """In memory too, where members are not read by zipfile."""
    cache = LogitCache(write_cache(tmp_path / "c"))
    info = cache.manifest.shards[0]
    path = cache.path / "shards" / info.name
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("k/c/0")
    start = member.header_offset
    for at in (start, start + 26, start + 30, start + 30 + len(member.filename)):  # magic, length, name, body
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        for sha256 in (hashlib.sha256(changed).hexdigest(), None):
            with pytest.raises(CachekdError, match="damaged"):
                read_shard(path, cache.manifest.codec.logprob_step, sha256=sha256)
    path.write_bytes(content)
    shards = [read_shard(path, 1 / 16, sha256=sha256) for sha256 in (info.sha256, None)]
    assert shards[0].keys == shards[1].keys
    assert np.array_equal(shards[0].targets.ids, shards[1].targets.ids)


# ---- peek and select


def test_memory_does_not_grow_with_the_cache(caches):
    small, large = map(LogitCache, caches)

    def listed(cache: LogitCache) -> None:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            print_samples(cache, choose_samples(cache, None, "coco/*", None), True)

    works: dict[str, Callable[[LogitCache], object]] = {
        "first": lambda cache: choose(cache, 5, "first", cache),
        "surprising": lambda cache: choose(cache, 5, "surprising", cache),
        "filter": lambda cache: choose_samples(cache, None, "*7", "logprob < -2 and key.str.contains('1')"),
        "list": listed,
        "histogram": LogitCache.histogram,
        "export": lambda cache: sum(
            1 for number in range(len(cache.manifest.shards)) for _ in cache.shard_samples(number)
        ),
    }
    for name, work in works.items():
        work(small)  # whatever is made at first use
        peaks = [peak(lambda cache=cache, work=work: work(cache)) for cache in (small, large)]
        assert peaks[1] < 1.5 * peaks[0] + 100_000, (name, peaks)  # 10 bytes a sample; a table takes 200
        assert not large._decoded


def test_each_shard_is_decoded_once_for_a_filter(caches, tmp_path, monkeypatch):
    decoded = []
    real = reader.read_shard
    monkeypatch.setattr(
        reader, "read_shard", lambda path, *a, **b: decoded.append(path) or real(path, *a, **b)
    )
    result = CliRunner().invoke(
        app, ["select", str(caches[0]), "-o", str(tmp_path / "out"), "--filter", "logprob < -2"]
    )
    assert result.exit_code == 0, result.output
    assert len(decoded) == len(set(decoded)) == len(LogitCache(caches[0]).manifest.shards) == 5


EXPRESSIONS = {
    "tokens > 1 and logprob > -2": True,
    "not (mean_k < 3) or tokens == 4": True,
    "key in ['coco/train/00000003', 'coco/train/00001999']": True,
    "key.str.endswith('7') and key.str.len() > 3": True,
    "-2 < logprob < -1.5": True,
    "logprob + tokens * 2 > 3": True,
    "shard != '00000.zarr.zip' & logprob < -3": True,
    "logprob < logprob.median()": False,
    "index > 1500": False,
    "logprob > mean_k.mean() - 6": False,
    "logprob in mean_k": False,
    "key == ['coco/train/00000003']": False,
    "logprob.rank() <= 30": False,
    "tokens[0] == tokens": False,
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_filter_by_shards_is_the_filter_of_the_whole_table(caches, expression):
    cache = LogitCache(caches[0])
    table = sample_table(cache)
    assert is_by_sample(expression) == EXPRESSIONS[expression]
    expected = filter_rows(table, expression)
    assert np.array_equal(np.concatenate(filter_samples(cache, expression)), expected)
    arguments = ["select", str(cache.path), "--list", "--json", "--match", "*[1-4]", "--filter", expression]
    result = CliRunner().invoke(app, arguments)
    rows = table[expected & table["key"].str.match(".*[1-4]$")].to_dict("records")
    assert result.stdout == json.dumps(rows, indent=2) + "\n"


def test_the_most_surprising_are_those_of_the_whole_table(caches):
    cache = LogitCache(caches[0])
    ordered = list(sample_table(cache).sort_values("logprob", kind="stable")["key"])
    for limit in (1, 7, 500, 5_000):
        assert choose(cache, limit, "surprising", cache) == ordered[:limit]
    some = set(ordered[::3])
    assert choose(cache, 20, "surprising", some) == [key for key in ordered if key in some][:20]
    assert choose(cache, 20, "first", some) == [key for key in cache if key in some][:20]
