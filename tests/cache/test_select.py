"""Subsets of a cache: every stored value as it was, not only close to it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cachekd.cache import LogitCache, LogitCacheWriter, Manifest, verify_files
from cachekd.cache.derive import merge_caches
from cachekd.cache.subset import filter_rows, sample_table
from cachekd.errors import CachekdError
from cachekd_cli.main import app
from caches import (
    assert_same_samples,
    dump_cache,
    files_of,
    flip,
    header,
    sample,
    select_samples,
    stored,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory, skipping_cache, teacher_path, data_path) -> dict[str, Path]:
    """With a sketch, without one, and written one by one with awkward keys."""
    folder = tmp_path_factory.mktemp("originals")
    plain = dump_cache(folder / "plain", teacher_path, data_path, tail="none")
    with LogitCacheWriter(folder / "odd", **header(), shard_tokens=9) as writer:
        for index, key in enumerate(["a\u2028b", "c\r", " ", "[b]", "é", "f'\"", "g\x85h", "\x1e"]):
            writer.add(key, *sample(index)[1:])
    return {"sketched": skipping_cache, "plain": plain, "odd": folder / "odd"}


@settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "6")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(name=st.sampled_from(["sketched", "plain", "odd"]), bits=st.integers(1, 2**13 - 1))
@example(name="sketched", bits=1)
@example(name="sketched", bits=0b111111)  # the whole of a shard
@example(name="odd", bits=2**13 - 1)
def test_every_stored_value_is_as_it_was(originals, tmp_path, name, bits):
    path, out = originals[name], tmp_path / "out"
    keys = [key for index, key in enumerate(LogitCache(path)) if bits >> index & 1]
    if not keys:
        return
    before = files_of(path)
    manifest = select_samples(path, out, set(keys))
    assert list(LogitCache(out)) == keys
    old, new = stored(path), stored(out)
    for key in keys:
        assert set(new[key]) == set(old[key])
        for part, values in old[key].items():
            assert np.array_equal(new[key][part], values), (key, part)
            assert new[key][part].dtype == values.dtype
    assert_same_samples(out, path)
    assert verify_files(out) == []
    assert manifest.samples == len(keys)
    assert manifest.skipped == Manifest.load(path).skipped
    assert files_of(path) == before
    shutil.rmtree(out)


def test_cutting_twice_is_cutting_once(originals, tmp_path):
    keys = list(LogitCache(originals["sketched"]))
    select_samples(originals["sketched"], tmp_path / "a", set(keys[1:9]))
    select_samples(tmp_path / "a", tmp_path / "b", set(keys[3:11]))
    select_samples(originals["sketched"], tmp_path / "c", set(keys[3:9]))
    twice, once = (files_of(tmp_path / name) for name in "bc")
    manifests = [json.loads(files.pop("manifest.json")) for files in (twice, once)]
    steps = [[step["operation"] for step in values.pop("lineage")] for values in manifests]
    assert steps == [["select", "select"], ["select"]]
    assert manifests[0].pop("sha256") != manifests[1].pop("sha256")
    assert manifests[0] == manifests[1]
    assert twice == once


def test_whole_shards_are_the_same_files_and_keep_their_place_in_the_data(originals, tmp_path):
    path = originals["sketched"]
    keys = list(LogitCache(path))
    manifest = select_samples(path, tmp_path / "c", set(keys[6:]))
    olds = Manifest.load(path).shards
    assert [info.span for info in manifest.shards] == [info.span for info in olds[1:]]
    for old, new in zip(olds[1:], manifest.shards, strict=True):
        old_file, new_file = path / "shards" / old.name, tmp_path / "c" / "shards" / new.name
        assert old_file.stat().st_ino == new_file.stat().st_ino
    cut = select_samples(path, tmp_path / "d", set(keys[7:]))
    assert [info.span is None for info in cut.shards] == [True, False]
    assert cut.shards[0].samples_sha256 is None
    assert cut.fidelity.tokens == cut.shards[1].fidelity.tokens  # of what was not cut


def test_only_what_the_samples_need_is_taken_along(originals, tmp_path, teacher_path, data_path):
    """Of a merged cache, the other source and its sketch stay behind."""
    from caches import write_data

    other = dump_cache(tmp_path / "other", teacher_path, write_data(tmp_path / "d", 8, start=70))
    merge_caches([originals["sketched"], other], tmp_path / "m")
    keys = set(list(LogitCache(other))[2:4])
    manifest = select_samples(tmp_path / "m", tmp_path / "c", keys)
    assert manifest.sources == Manifest.load(other).sources
    assert manifest.sketches == Manifest.load(other).sketches
    assert_same_samples(tmp_path / "c", other)
    assert verify_files(tmp_path / "c") == []


def test_a_damaged_shard_is_not_cut(originals, tmp_path):
    path = shutil.copytree(originals["sketched"], tmp_path / "c")
    flip(path / "shards" / "00000.zarr.zip", 700)
    with pytest.raises(CachekdError, match="damaged"):
        select_samples(path, tmp_path / "out", {"s001"})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_nothing_left_and_a_folder_that_is_taken(originals, tmp_path):
    with pytest.raises(CachekdError, match="no sample is left"):
        select_samples(originals["plain"], tmp_path / "out", set())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(CachekdError, match="already holds something"):
        select_samples(originals["plain"], tmp_path, {"s001"})


# ---- filters


def test_the_table_is_what_the_cache_holds(originals):
    for name in originals:
        cache = LogitCache(originals[name])
        table = sample_table(cache)
        assert list(table["key"]) == list(cache)
        for row in table.itertuples():
            targets = cache[row.key]
            assert row.tokens == len(targets)
            assert row.mean_k == pytest.approx(float(targets.k.double().mean()))
            own = targets.gather(targets.token_ids[:, None])[:, 0]
            assert row.logprob == pytest.approx(float(own.double().mean()), abs=1e-4)
            assert row.shard == cache.manifest.shards[cache.shard_of(row.key)].name


@pytest.mark.parametrize(
    "expression",
    [
        "tokens > 5",
        "tokens >= 3 and logprob > -6",
        "not (mean_k < 20) or tokens == 4",
        "key == 's003'",
        "key in ['s001', 's004']",
        "key.str.startswith('s00')",
        "shard != '00000.zarr.zip' & tokens > 2",
        "logprob < logprob.median()",
        "tokens > 1000",
    ],
)
def test_filters(originals, expression):
    table = sample_table(LogitCache(originals["plain"]))
    found = list(table["key"][filter_rows(table, expression)])
    assert found == list(table.query(expression, engine="python")["key"])


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "tokens >",
        "tokens",
        "tokens + 1",
        "True",
        "length > 5",
        "tokens = 5",
        "tokens > 'x'",
        "import os",
        "__import__('os').remove('x')",
        "@cache",
        "key.nothing()",
        "tokens > 1\nlogprob > 2",
        "(" * 200,
        "\ud800",
    ],
)
def test_bad_filters_are_explained(originals, expression):
    table = sample_table(LogitCache(originals["plain"]))
    with pytest.raises(CachekdError, match="the filter cannot be used") as caught:
        filter_rows(table, expression)
    assert "key, tokens, mean_k, logprob, shard" in str(caught.value)


# ---- the command


def invoke(*args: object, text: str | None = None):
    return CliRunner().invoke(app, ["select", *map(str, args)], input=text)


def test_conditions_are_combined(originals, tmp_path):
    path = originals["sketched"]
    (tmp_path / "keys").write_bytes(b"s000\r\ns001\n\ns008\ns010\n")
    out = tmp_path / "[c]"
    result = invoke(path, "-o", out, "--keys", tmp_path / "keys", "--match", "s00*", "--filter", "tokens > 3")
    assert result.exit_code == 0, result.output
    table = sample_table(LogitCache(path)).set_index("key")
    expected = [key for key in ("s000", "s001", "s008") if table["tokens"][key] > 3]
    assert list(LogitCache(out)) == expected
    assert f"[c]: {len(expected)} of 13 samples" in result.output.replace("\n", "")
    result = invoke(path, "--out", tmp_path / "stdin", "--keys", "-", "--json", text="s010\ns011\n")
    assert json.loads(result.stdout)["samples"] == 2
    assert list(LogitCache(tmp_path / "stdin")) == ["s010", "s011"]


def test_keys_with_strange_line_breaks(originals, tmp_path):
    (tmp_path / "keys").write_text("a\u2028b\ng\x85h\n", encoding="utf-8")
    assert invoke(originals["odd"], "-o", tmp_path / "c", "--keys", tmp_path / "keys").exit_code == 0
    assert list(LogitCache(tmp_path / "c")) == ["a\u2028b", "g\x85h"]


def test_list_shows_and_makes_nothing(originals, tmp_path):
    path = originals["sketched"]
    result = invoke(path, "--list", "--filter", "tokens > 3")
    assert result.exit_code == 0
    assert "samples of" in result.output
    result = invoke(path, "--list", "--json")
    rows = json.loads(result.stdout)
    assert [row["key"] for row in rows] == list(LogitCache(path))
    assert set(rows[0]) == {"key", "tokens", "mean_k", "logprob", "shard"}
    assert json.loads(invoke(path, "--list", "--json", "--match", "x*").stdout) == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-o", "out", "--keys", "missing"], "the keys cannot be read"),
        (["-o", "out", "--keys", "latin"], "the keys cannot be read"),
        (["-o", "out", "--keys", "unknown"], "2 others, such as 'x1'"),
        (["-o", "out"], "nothing is left out"),
        (["-o", "out", "--match", "*"], "nothing is left out"),
        (["-o", "out", "--match", "x*"], "no sample is left"),
        (["-o", "out", "--filter", "tokens >"], "the filter cannot be used"),
        (["--match", "s*"], "one or the other"),
        (["-o", "out", "--list"], "one or the other"),
    ],
)
def test_bad_use_is_explained(originals, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    Path("latin").write_bytes(b"\xff\n")
    Path("unknown").write_text("s001\nx2\nx1\n")
    result = invoke(originals["sketched"], *args)
    assert isinstance(result.exception, CachekdError)
    assert says in str(result.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin", "unknown"]
