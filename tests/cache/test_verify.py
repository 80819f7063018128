"""Whatever happens to a file of a cache, `verify` sees it, and so does a training that reads it."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cachekd.cache import LogitCache, Manifest, shard_rules, verify_files
from cachekd.cache.build import dump_status
from cachekd.cache.plan import FinishedShard, Plan, read_skipped
from cachekd.cache.sealed import is_canonical
from cachekd.cache.sparse_logits import offsets
from cachekd.cache.verify import dump_files, strays, wrong_files
from cachekd.config import DumpConfig
from cachekd.dump import dump
from cachekd.errors import CachekdError
from cachekd_cli.main import app
from caches import copied, dump_cache, files_of, flip, reseal, write_cache, write_data


@pytest.fixture
def cache(tmp_path, skipping_cache) -> Path:
    return copied(skipping_cache, tmp_path / "c")


def is_seen(path: Path, file: Path) -> bool:
    """Whether `verify` blames that file, and no other that is not made of it."""
    try:
        found = {finding.path for finding in verify_files(path)}
    except CachekdError as error:
        return file.name == "manifest.json" and str(file) in str(error)
    return file in found


def read_every_shard(cache: LogitCache) -> None:
    for number in range(len(cache.manifest.shards)):
        cache.shard_targets(number)[0].everywhere()
    assert cache.vocabulary is not None


def test_a_sound_cache_has_nothing_wrong(cache):
    assert set(files_of(cache)) == {
        "manifest.json",
        "skipped.jsonl",
        "sketch.zarr.zip",
        "vocabulary.zarr.zip",
        "dump/plan.json",
        *(f"dump/0000{number}.json" for number in range(4)),
        *(f"shards/0000{number}.zarr.zip" for number in (0, 1, 3)),  # nothing of the third was usable
    }
    assert verify_files(cache) == []
    assert strays(cache) == []
    counted = []
    verify_files(cache, counted.append)
    manifest = Manifest.load(cache)
    assert sum(counted) == manifest.size + manifest.sketch_bytes + manifest.vocabulary_bytes


def test_flips_in_every_file_are_seen(cache):
    generator = random.Random(0)
    for name, content in files_of(cache).items():
        file = cache / name
        for position in (0, -2, generator.randrange(len(content))):
            flip(file, position, 1 << generator.randrange(8))
            assert is_seen(cache, file), (name, position)
            if name.startswith(("shards", "sketch", "vocabulary")):
                with pytest.raises(CachekdError, match="damaged"):
                    read_every_shard(LogitCache(cache))
            file.write_bytes(content)
    assert verify_files(cache) == []


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flip_in_the_manifest_is_seen(cache, stride):
    """By what `verify` looks at first."""
    file, generator = cache / "manifest.json", random.Random(0)
    for position in range(0, len(file.read_bytes()), stride):
        content = flip(file, position, 1 << generator.randrange(8))
        try:
            Manifest.load(cache)
            assert not is_canonical(file), position
        except CachekdError:
            pass
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("masks", "stride"), [((0x04,), 29), pytest.param((0x01, 0x20, 0x80), 1, marks=pytest.mark.slow)]
)
def test_every_flip_in_plan_records_and_skipped_is_seen(cache, masks, stride):
    manifest = Manifest.load(cache)
    for file in [*(cache / "dump").iterdir(), cache / "skipped.jsonl"]:
        for position in range(0, len(file.read_bytes()), stride):
            content = flip(file, position, masks[position % len(masks)])
            try:
                seen = {
                    path for path, _, _ in wrong_files(cache, manifest, read_skipped(cache, manifest.skipped))
                }
            except CachekdError as error:
                seen = {Path(str(error.where))}
            assert file in seen, (file.name, position)
            file.write_bytes(content)


@pytest.mark.parametrize("places", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_flips_in_a_binary_are_seen_by_a_reader(cache, places):
    """Evenly spread, in each."""
    opened, generator = LogitCache(cache), random.Random(0)
    reads = {"sketch.zarr.zip": lambda reader: reader.sketch(0)}
    reads["vocabulary.zarr.zip"] = lambda reader: reader.vocabulary
    for number, info in enumerate(opened.manifest.shards):
        reads[f"shards/{info.name}"] = lambda reader, number=number: reader.shard_targets(number)
    for name, read in reads.items():
        file = cache / name
        size = file.stat().st_size
        for position in range(0, size, size // places):
            content = flip(file, position, 1 << generator.randrange(8))
            with pytest.raises(CachekdError, match="damaged"):
                read(pickle.loads(pickle.dumps(opened)))  # has decoded nothing yet
            file.write_bytes(content)
    read_every_shard(opened)


def test_missing_and_short_files_are_seen(cache):
    for name, content in files_of(cache).items():
        file = cache / name
        for short in (b"", content[:-1], content + b"\n"):
            file.write_bytes(short)
            assert is_seen(cache, file), (name, len(short))
        file.unlink()
        if name == "manifest.json":
            with pytest.raises(CachekdError, match="did not finish"):
                verify_files(cache)
        else:
            assert is_seen(cache, file), name
        if name.startswith(("shards", "sketch", "vocabulary")):
            with pytest.raises(CachekdError, match="is missing"):
                LogitCache(cache)
        file.write_bytes(content)
    shutil.rmtree(cache / "dump")  # as a whole it is not needed
    assert verify_files(cache) == []
    shutil.rmtree(cache / "shards")
    assert [finding.shard for finding in verify_files(cache)] == [0, 1, 2]


def test_swapped_and_foreign_shards_are_seen(cache, tmp_path, teacher_path):
    first, second = (cache / "shards" / f"0000{number}.zarr.zip" for number in (0, 1))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert [(finding.path, finding.shard) for finding in verify_files(cache)] == [(first, 0), (second, 1)]
    second.write_bytes(contents[1])
    other = dump_cache(tmp_path / "other", teacher_path, write_data(tmp_path / "d", 12, start=50))
    first.write_bytes((other / "shards" / "00000.zarr.zip").read_bytes())
    assert [finding.path for finding in verify_files(cache)] == [first]
    with pytest.raises(CachekdError, match=r"cut short or changed|damaged"):
        read_every_shard(LogitCache(cache))


def test_a_sketch_of_another_cache_is_seen(cache, tmp_path, teacher_path):
    other = dump_cache(tmp_path / "other", teacher_path, write_data(tmp_path / "d", 12, start=50))
    shutil.copy(other / "sketch.zarr.zip", cache)
    assert [finding.path.name for finding in verify_files(cache)] == ["sketch.zarr.zip"]
    with pytest.raises(CachekdError, match=r"cut short or changed|damaged"):
        read_every_shard(LogitCache(cache))


def test_what_is_no_part_of_the_cache_is_a_note(cache):
    added = [cache / "README.md", cache / "shards" / "00009.zarr.zip", cache / "dump" / ".x.tmp-host-1"]
    for file in added:
        file.write_bytes(b"mine")
    assert verify_files(cache) == []
    assert set(strays(cache)) == set(added)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (
            "manifest.json",
            lambda v: v["shards"][0].update(tokens=v["shards"][0]["tokens"] + 1),
            "samples, tokens and entries",
        ),
        ("manifest.json", lambda v: v["shards"][0].update(bytes=1), "the manifest says 1"),
        ("manifest.json", lambda v: v["sketches"][0].update(axes=1), "axes and step"),
        ("manifest.json", lambda v: v["vocabulary"].update(tokens=400), "lengths has shape"),
        ("manifest.json", lambda v: v["skipped"].update(samples=1), "expected 1 in"),
        ("manifest.json", lambda v: v["shards"].pop(1), "says something else than the manifest"),
        ("manifest.json", lambda v: v["sources"][0]["data"].update(samples=10**9), "says something else"),
        ("dump/plan.json", lambda v: v["codec"].update(top_k=9), "says something else than the manifest"),
        ("dump/00000.json", lambda v: v["shard"].update(tokens=1), "says something else than the manifest"),
        ("dump/00001.json", lambda v: v.update(skipped=[]), "says something else than the manifest"),
    ],
)
def test_files_that_contradict_each_other_are_seen(cache, name, change, problem):
    """With every seal in order: whoever did this wanted it."""
    reseal(cache / name, change)
    assert any(problem in finding.problem for finding in verify_files(cache)), verify_files(cache)


@pytest.mark.slow
def test_a_manifest_of_fifty_thousand_shards_is_read(cache):
    """What is bounded before it is parsed leaves room for the largest that the format allows."""

    def many(values):
        shard = values["shards"][0] | {"samples": 6, "tokens": 6, "entries": 12, "without_image": 0}
        values["sources"][0]["data"]["samples"] = 6 * 50_000
        values["shards"] = [
            shard | {"name": f"{number:05d}.zarr.zip", "span": [6 * number, 6 * number + 6]}
            for number in range(50_000)
        ]
        for one in values["shards"]:
            one["fidelity"] = one["fidelity"] | {"tokens": 6}

    reseal(cache / "manifest.json", many)
    manifest = Manifest.load(cache)
    assert len(manifest.shards) == 50_000
    assert (cache / "manifest.json").stat().st_size > 2**24


def test_a_key_in_two_shards_is_seen(tmp_path):
    path = write_cache(tmp_path / "c", 6, shard_tokens=4)

    def twice(values):
        values["shards"][1] |= values["shards"][0] | {"name": values["shards"][1]["name"]}

    shutil.copy(path / "shards" / "00000.zarr.zip", path / "shards" / "00001.zarr.zip")
    shutil.rmtree(path / "dump")
    reseal(path / "manifest.json", twice)
    assert any("is in 00000.zarr.zip as well" in finding.problem for finding in verify_files(path))


def test_plan_and_records_follow_from_the_manifest(cache, tmp_path):
    """Byte by byte; also where samples were added one by one."""
    for path in (cache, write_cache(tmp_path / "one-by-one", 6, shard_tokens=4)):
        manifest = Manifest.load(path)
        made = dict(dump_files(manifest, read_skipped(path, manifest.skipped)))
        assert made == {name: content for name, content in files_of(path).items() if name.startswith("dump/")}


def test_samples_that_were_left_out_are_not_all_in_memory(cache):
    """Nor are the records of shards of which nothing was kept."""
    count = 10_000
    content = b"".join(b'{"key": "k%d", "reason": "too long"}\n' % number for number in range(count))
    (cache / "skipped.jsonl").write_bytes(content)

    def leave_out(values):
        values["sources"][0]["data"]["samples"] = values["shards"][-1]["span"][1] + count
        sha256 = hashlib.sha256(content).hexdigest()
        values["skipped"] = {"samples": count, "bytes": len(content), "sha256": sha256}

    reseal(cache / "manifest.json", leave_out)
    manifest = Manifest.load(cache)
    tracemalloc.start()
    try:
        skipped = read_skipped(cache, manifest.skipped)
        left_out = sum(content.count(b'"reason"') for _, content in dump_files(manifest, skipped))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left_out == len(skipped) == len(list(skipped)) == count
    assert peak < 5 * len(content)


# ---- status


def test_status_of_a_cache_and_of_a_dump_under_way(cache, teacher_path, broken_data):
    whole = dump_status(cache)
    assert (whole.finished, whole.shards, whole.samples, whole.all_samples, whole.skipped) == (
        True,
        3,
        13,
        20,
        7,
    )
    (cache / "manifest.json").unlink()
    last = dump_status(cache)
    assert (last.finished, last.shards, last.all_shards, last.samples, last.skipped) == (False, 4, 4, 13, 7)
    (cache / "dump" / "00001.json").unlink()
    flip(cache / "dump" / "00003.json", 40)
    (cache / "dump" / "12.json").write_text("{}")  # not one of ours
    under_way = dump_status(cache)
    assert (under_way.shards, under_way.samples, under_way.skipped) == (2, 6, 6)
    assert under_way.tokens == json.loads((cache / "dump" / "00000.json").read_text())["shard"]["tokens"]
    for args in ([], ["--json"]):
        result = CliRunner().invoke(app, ["status", str(cache), *args])
        assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["finished"] is False
    (cache / "dump" / "12.json").unlink()
    settings = {"batch_size": 2, "shard_samples": 6, "calibration_tokens": 60, "on_error": "skip"}
    dump(DumpConfig(teacher=str(teacher_path), data=str(broken_data), out=cache, **settings))
    assert verify_files(cache) == []


def test_status_of_what_is_written_one_by_one_is_explained(tmp_path):
    path = write_cache(tmp_path / "c")
    assert dump_status(path).finished
    (path / "manifest.json").unlink()
    with pytest.raises(CachekdError, match="one by one"):
        dump_status(path)


def test_status_of_nothing_is_explained(tmp_path):
    with pytest.raises(CachekdError, match="not a cache"):
        dump_status(tmp_path)


# ---- the command


def invoke(*args: object):
    return CliRunner().invoke(app, ["verify", *map(str, args)])


def test_verify_says_what_is_wrong(cache):
    result = invoke(cache)
    assert result.exit_code == 0, result.output
    assert "3 shards with 13 samples" in result.output
    (cache / "[b]notes").write_text("mine")
    content = flip(cache / "shards" / "00001.zarr.zip", 500)
    result = invoke(cache)
    assert result.exit_code == 1
    assert "00001.zarr.zip differs from what was written" in result.output
    assert "note: " in result.output
    assert "[b]notes is no part" in result.output
    result = invoke(cache, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["ok"] is False
    assert [problem["shard"] for problem in told["problems"]] == [1]
    assert len(told["strays"]) == 1
    (cache / "shards" / "00001.zarr.zip").write_bytes(content)
    told = json.loads(invoke(cache, "--json").stdout)
    assert told["ok"] is True


def test_verify_of_a_damaged_manifest_is_a_finding(cache, tmp_path):
    flip(cache / "manifest.json", 300)
    result = invoke(cache, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"][0]["file"].endswith("manifest.json")
    result = invoke(tmp_path / "nothing")
    assert isinstance(result.exception, CachekdError)  # the command's exit code 2
    result = invoke(cache, "--teacher", "x")
    assert "go together" in str(result.exception)
    assert invoke(cache, "--sample", 0).exit_code == 2


def test_a_plan_and_records_of_another_dump_are_seen(cache, tmp_path, teacher_path):
    other = dump_cache(tmp_path / "other", teacher_path, write_data(tmp_path / "d", 12, start=50))
    shutil.copy(other / "dump" / "00000.json", cache / "dump")
    assert [finding.path.name for finding in verify_files(cache)] == ["00000.json"]
    shutil.copy(other / "dump" / "plan.json", cache / "dump")
    assert {"plan.json", "00000.json"} <= {finding.path.name for finding in verify_files(cache)}
    assert (
        Plan.read(other / "dump" / "plan.json").sha256
        == FinishedShard.read(other / "dump" / "00001.json").plan_sha256
    )


@pytest.mark.parametrize("ranked", [300, 2**16 + 300])
@pytest.mark.parametrize("together", [1, 50, 2**16])
def test_an_id_twice_is_found_wherever_it_is(monkeypatch, ranked, together):
    monkeypatch.setattr(shard_rules, "_SORTED", together)
    rng = np.random.default_rng(ranked + together)
    k = rng.integers(1, 20, 60).astype("<u2")
    starts = offsets(k)
    type_ = "<u2" if ranked <= 2**16 else "<u4"
    # Neighbours share most of their ids, which is nothing wrong.
    ranks = np.concatenate([rng.permutation(25)[:n] + ranked - 25 for n in k]).astype(type_)
    shard_rules.require_different(ranks, k)
    for token in np.flatnonzero(k > 1):
        first, second = rng.choice(np.arange(starts[token], starts[token + 1]), 2, replace=False)
        wrong = ranks.copy()
        wrong[first] = wrong[second]
        with pytest.raises(ValueError, match="twice"):
            shard_rules.require_different(wrong, k)
