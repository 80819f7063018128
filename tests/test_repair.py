"""Repair gives back the very bytes and touches nothing else; the teacher sees what checksums cannot."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import copied, dump_cache, files_of, flip, reseal, times_of, write_data
from test_cache import write_cache
from tiny import noise_image, png_bytes, save_vlm, tar_members, tiny_processor, write_tar
from typer.testing import CliRunner

from cachekd.cache import LogitCache, Manifest, verify_files
from cachekd.cache.arrays import pack_arrays, read_arrays
from cachekd.cache.mend import restore_manifest, tidy
from cachekd.cache.merge import merge_caches
from cachekd.cache.recompress import cuts, recompress
from cachekd.cache.shard import pack_shard, read_shard
from cachekd.cache.subset import select_samples
from cachekd.config import TrainConfig
from cachekd.data_options import DataOptions
from cachekd.dump import open_teacher
from cachekd.errors import CachekdError
from cachekd.recheck import Recheck, recheck
from cachekd.samples import open_samples
from cachekd.train import train
from cachekd_cli.main import app


@pytest.fixture
def cache(tmp_path, skipping_cache) -> Path:
    return copied(skipping_cache, tmp_path / "c")


def verify(*args: object) -> Any:
    """The command, with --json; a CachekdError is raised."""
    result = CliRunner().invoke(app, ["verify", *map(str, args), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def repair(path: Path, teacher: Path, data: Path, *args: object) -> dict[str, Any]:
    result = verify(path, "--repair", "--teacher", teacher, "--data", data, "--sample", 1, *args)
    told = json.loads(result.stdout)
    assert result.exit_code == (0 if told["ok"] else 1)
    return told


def break_shard(path: Path, number: int, how: str) -> Path:
    file = path / "shards" / Manifest.load(path).shards[number].name
    if how == "flip":
        flip(file, 900)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        file.unlink()
    return file


# ---- shards


@pytest.mark.parametrize(
    "broken", [{1: "flip"}, {0: "cut", 2: "gone"}, {0: "gone", 1: "gone", 2: "flip"}], ids=str
)
def test_broken_shards_come_back_byte_by_byte(cache, teacher_path, broken_data, broken):
    whole, times = files_of(cache), times_of(cache)
    files = {break_shard(cache, number, how) for number, how in broken.items()}
    told = repair(cache, teacher_path, broken_data)
    assert told["ok"]
    assert len(told["repaired"]) == len(broken)
    assert all("the same bytes" in line for line in told["repaired"])
    assert files_of(cache) == whole
    changed = {name for name, time in times_of(cache).items() if time != times[name]}
    assert changed == {str(file.relative_to(cache)) for file in files}


@pytest.mark.parametrize(
    "settings",
    [
        {"limit": 9, "tail": "none"},
        pytest.param({"shuffle_seed": 3}, marks=pytest.mark.slow),
        {"limit": 14, "shuffle_seed": 5, "on_error": "skip", "workers": 1},
        pytest.param({"disk_budget": "60kB"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_data_are_read_as_for_the_dump(tmp_path, teacher_path, data_path, broken_data, settings):
    data = broken_data if "on_error" in settings else data_path
    path = dump_cache(tmp_path / "c", teacher_path, data, **settings)
    whole = files_of(path)
    for number in (0, len(Manifest.load(path).shards) - 1):
        break_shard(path, number, "flip")
    assert repair(path, teacher_path, data)["ok"]
    assert files_of(path) == whole


def test_other_numerics_are_accepted_and_said(cache, tmp_path, teacher_path, broken_data):
    """As if from another machine: shard 1 has other last bits."""
    file = cache / "shards" / "00001.zarr.zip"
    theirs = pack_shard(read_shard(file, 1 / 16, sketch=True), 1 / 16) + b"\0"  # any other bytes

    def other(info):
        info |= {"sha256": hashlib.sha256(theirs).hexdigest(), "bytes": len(theirs)}

    reseal(cache / "manifest.json", lambda values: other(values["shards"][1]))
    reseal(cache / "manifest.json", lambda values: values["sources"][0]["versions"].update(torch="0.1"))
    shutil.rmtree(cache / "dump")
    (cache / "dump").mkdir()
    file.unlink()
    told = repair(cache, teacher_path, broken_data)
    assert told["ok"]
    assert "its bytes differ: torch 0.1 then" in told["repaired"][0]
    assert verify_files(cache) == []


def test_other_numerics_reach_plan_and_records(cache, teacher_path, broken_data, skipping_cache):
    """The manifest and the records agree afterwards."""

    def other(info):
        info |= {"sha256": "0" * 64, "bytes": 5}

    reseal(cache / "manifest.json", lambda values: other(values["shards"][1]))
    reseal(cache / "dump" / "00001.json", lambda values: other(values["shard"]))
    assert {finding.path.name for finding in verify_files(cache)} == {"00001.zarr.zip"}
    assert repair(cache, teacher_path, broken_data)["ok"]
    assert files_of(cache) == files_of(skipping_cache)


def test_changed_data_are_refused(cache, tmp_path, teacher_path):
    """Another pixel or question; a sample that was good and is bad, or the reverse."""
    broken = break_shard(cache, 1, "gone")
    before = files_of(cache)

    def data(name: str, changed: dict[int, bytes]) -> Path:
        members = tar_members(20)
        for index in (7, 12, 13, 14, 15, 16, 17):
            members[2 * index] = (members[2 * index][0], b"not a png")
        for place, content in changed.items():
            members[place] = (members[place][0], content)
        write_tar(tmp_path / name / "0.tar", members)
        return tmp_path / name

    image = noise_image(8)
    image.putpixel((0, 0), (0, 0, 0))
    good = tar_members(20)
    cases = {
        "pixel": {16: png_bytes(image)},
        "words": {
            17: good[17][1].replace(b"dog", b"cat").replace(b"color", b"shape").replace(b"large", b"small")
        },
        "now bad": {16: b"not a png"},
        "now good": {14: good[14][1]},
        "another is bad": {14: good[14][1], 16: b"not a png"},
    }
    for name, changed in cases.items():
        path = data(name, changed)
        with pytest.raises(CachekdError, match="data set has changed since the dump"):
            repair(cache, teacher_path, path)
        assert files_of(cache) == before, name
    write_data(tmp_path / "fewer", 19, bad=(7, 12, 13, 14, 15, 16, 17))
    with pytest.raises(CachekdError, match="not the one that the broken shards are of") as caught:
        repair(cache, teacher_path, tmp_path / "fewer")
    assert "20 samples" in str(caught.value)
    assert "19 samples" in str(caught.value)
    assert not broken.exists()


def test_another_teacher_is_refused(cache, tmp_path, broken_data, teacher_path):
    break_shard(cache, 1, "flip")
    before = files_of(cache)
    other = save_vlm(tmp_path / "t", tiny_processor(), text_width=48, vision_layers=3, seed=9)
    with pytest.raises(CachekdError, match="different teacher's weights") as caught:
        repair(cache, other, broken_data)
    assert Manifest.load(cache).teacher.weights_sha256 in str(caught.value)
    with pytest.raises(CachekdError, match=r"1 shard\(s\) can only be made again by the teacher"):
        verify(cache, "--repair")
    assert files_of(cache) == before


def test_a_broken_sketch_is_refused(cache, teacher_path, broken_data):
    flip(cache / "sketch.zarr.zip", 3000)
    break_shard(cache, 1, "flip")
    before = files_of(cache)
    with pytest.raises(CachekdError, match="tail sketch cannot be made again"):
        repair(cache, teacher_path, broken_data)
    assert files_of(cache) == before


def test_shards_that_are_of_no_span_are_refused(
    skipping_cache, tmp_path, teacher_path, data_path, broken_data
):
    select_samples(skipping_cache, tmp_path / "cut", {"s001", "s002"})
    for path, data in ((tmp_path / "cut", broken_data), (write_cache(tmp_path / "one-by-one"), data_path)):
        break_shard(path, 0, "flip")
        with pytest.raises(CachekdError, match="was cut from another, or its samples were added one by one"):
            repair(path, teacher_path, data)


def test_a_merged_cache_is_repaired_source_by_source(tmp_path, cache, teacher_path, broken_data):
    data = write_data(tmp_path / "d", 14, start=40)
    other = dump_cache(tmp_path / "other", teacher_path, data, limit=13)
    merged = tmp_path / "m"
    merge_caches([cache, other], merged)
    whole, parts = files_of(merged), (files_of(cache), files_of(other))
    shards = Manifest.load(merged).shards
    assert [info.source for info in shards] == [0, 0, 0, 1, 1, 1]
    for number in (1, 4, 5):
        file = merged / "shards" / shards[number].name
        content = file.read_bytes()
        file.unlink()  # not through the hard link
        file.write_bytes(content[:-9])
    told = repair(merged, teacher_path, data)
    assert not told["ok"]
    assert [problem["shard"] for problem in told["problems"]] == [1]
    assert len(told["repaired"]) == 2
    told = repair(merged, teacher_path, broken_data)
    assert told["ok"]
    assert files_of(merged) == whole
    assert (files_of(cache), files_of(other)) == parts


# ---- manifest, plan, records, skipped.jsonl


DAMAGES = {
    "flip": lambda file: flip(file, 300),
    "empty": lambda file: file.write_bytes(b""),
    "reformatted": lambda file: file.write_text(file.read_text().replace("\n", "")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_manifest_is_written_again(cache, tmp_path, damage):
    for path in (cache, write_cache(tmp_path / "one-by-one", 6, shard_tokens=4)):
        whole = files_of(path)
        damage(path / "manifest.json")
        told = json.loads(verify(path, "--repair").stdout)
        assert told["ok"]
        assert "manifest.json: written again" in told["repaired"][0]
        assert files_of(path) == whole


def test_manifest_and_shard_at_once(cache, teacher_path, broken_data):
    whole = files_of(cache)
    break_shard(cache, 1, "gone")
    flip(cache / "manifest.json", 300)
    flip(cache / "skipped.jsonl", 30)
    assert repair(cache, teacher_path, broken_data)["ok"]
    assert files_of(cache) == whole


@pytest.mark.parametrize(
    "names",
    [
        ["dump/plan.json"],
        ["dump/00000.json"],
        ["dump/00001.json", "dump/00002.json", "dump/00003.json"],
        ["skipped.jsonl"],
        ["skipped.jsonl", "dump/plan.json"],
        ["dump/plan.json", "dump/00000.json", "dump/00001.json", "dump/00002.json", "dump/00003.json"],
    ],
)
@pytest.mark.parametrize("how", ["flip", "gone", "empty"])
def test_plan_records_and_skipped_come_back(cache, names, how):
    if how == "gone" and len(names) == 5:
        return  # a cache without dump/ is whole
    if how != "flip" and "skipped.jsonl" in names and "dump/plan.json" in names:
        return
    whole = files_of(cache)
    for name in names:
        if how == "flip":
            flip(cache / name, 30)
        elif how == "gone":
            (cache / name).unlink()
        else:
            (cache / name).write_bytes(b"")
    if "skipped.jsonl" in names and "dump/plan.json" in names:
        with pytest.raises(CachekdError, match=r"skipped\.jsonl is not what was written"):
            verify(cache, "--repair")
        return
    told = json.loads(verify(cache, "--repair").stdout)
    assert told["ok"], told
    assert len(told["repaired"]) == len(names)
    assert files_of(cache) == whole
    assert tidy(cache) == []


def test_what_cannot_be_restored_is_explained(cache):
    before = files_of(cache)
    flip(cache / "manifest.json", 300)
    flip(cache / "dump" / "00001.json", 100)
    with pytest.raises(CachekdError, match="the manifest cannot be written again") as caught:
        verify(cache, "--repair")
    assert "3 of 4 shards have a sound record" in str(caught.value)
    (cache / "dump" / "00001.json").write_bytes(before["dump/00001.json"])
    sketch = (cache / "sketch.zarr.zip").read_bytes()
    (cache / "sketch.zarr.zip").unlink()
    with pytest.raises(CachekdError, match="the tail sketch is missing"):
        restore_manifest(cache)
    (cache / "sketch.zarr.zip").write_bytes(sketch)
    (cache / "manifest.json").write_bytes(before["manifest.json"])
    flip(cache / "skipped.jsonl", 20)
    flip(cache / "dump" / "00001.json", 100)
    with pytest.raises(CachekdError, match=r"skipped\.jsonl cannot be written again"):
        tidy(cache)


def test_a_lost_last_record_is_noticed(tmp_path):
    """Where samples were added one by one, nothing says how many shards there were but the shards."""
    path = write_cache(tmp_path / "c", 6, shard_tokens=4)
    last = max((path / "dump").glob("0*.json"))
    last.unlink()
    flip(path / "manifest.json", 300)
    with pytest.raises(CachekdError, match="cannot be written again"):
        restore_manifest(path)


def test_repair_of_a_sound_cache_does_nothing(cache, teacher_path, broken_data):
    times = times_of(cache)
    assert repair(cache, teacher_path, broken_data)["repaired"] == []
    assert times_of(cache) == times


# ---- ask again


def ask(path: Path, teacher: Path, data: Path, count: int = 99, **options: Any) -> Recheck:
    cache, samples = LogitCache(path), open_samples(data)
    model = open_teacher(
        str(teacher), samples, DataOptions.of(data, on_error="skip"), cache.manifest.codec, "float32"
    )
    return recheck(cache, model, samples, count, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, teacher_path, data_path) -> Path:
    return dump_cache(tmp_path_factory.mktemp("plain") / "c", teacher_path, data_path, tail="none", top_k=24)


def test_a_good_cache_passes(skipping_cache, plain, teacher_path, data_path, broken_data):
    for path, data in ((skipping_cache, broken_data), (plain, data_path)):
        counted = []
        found = ask(path, teacher_path, data, progress=counted.append)
        cache = LogitCache(path)
        assert found.mismatches == []
        assert found.samples == found.all_samples == len(cache) == sum(counted)
        assert found.tokens == cache.manifest.tokens
        assert 0 < found.max_error <= found.bound
        assert (found.code_bound > 1) == (path == skipping_cache)
        assert found.max_code_error <= found.code_bound


def repack(path: Path, number: int, change: Any, step: float = 1 / 16) -> set[str]:
    """Alter the values of a shard, with checksums and seals that fit; returns the keys of its samples."""
    name = Manifest.load(path).shards[number].name
    file = path / "shards" / name
    shard = read_shard(file, step, sketch=Manifest.load(path).shards[number].sketch is not None)
    shard = replace(shard, targets=change(shard.targets))
    file.unlink()
    file.write_bytes(pack_shard(shard, step))
    content = file.read_bytes()
    info = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "entries": len(shard.targets.ids),
    }
    reseal(path / "manifest.json", lambda values: values["shards"][number].update(info))
    shutil.rmtree(path / "dump", ignore_errors=True)
    assert verify_files(path) == []
    return set(shard.keys)


def adding_up(targets):
    """So that nothing is wrong in itself: only the teacher knows better."""
    starts = np.concatenate([[0], np.cumsum(targets.k, dtype=int)])[:-1]
    kept = np.logaddexp.reduceat(targets.logprobs.astype(np.float64), starts)
    moved = np.log1p(-np.exp(targets.tail_logmass.astype(np.float64))) - kept
    return replace(targets, logprobs=(targets.logprobs + np.repeat(moved, targets.k)).astype(np.float32))


def shifted(targets):
    """The most probable id of each token is somewhat more so."""
    starts = np.concatenate([[0], np.cumsum(targets.k, dtype=int)])[:-1]
    logprobs = targets.logprobs - np.float32(0.4)
    logprobs[starts] += np.float32(0.4)
    return adding_up(replace(targets, logprobs=logprobs))


def other_ids(targets):
    return replace(targets, ids=((targets.ids + 1) % (targets.ids.max() + 1)).astype(np.uint32))


def more_tail(targets):
    return adding_up(replace(targets, tail_logmass=(targets.tail_logmass - 0.5).astype(np.float32)))


def least_for_most(targets):
    """The first entries go, their mass to the tail: each value that is left is right."""
    starts = np.concatenate([[0], np.cumsum(targets.k, dtype=int)])[:-1]
    kept = np.ones(len(targets.ids), bool)
    kept[starts] = False
    tail = np.logaddexp(targets.tail_logmass, targets.logprobs[starts])
    k = (targets.k - 1).astype(np.uint16)
    return replace(
        targets,
        ids=targets.ids[kept],
        logprobs=targets.logprobs[kept],
        k=k,
        knee=np.minimum(targets.knee, k),
        tail_logmass=tail.astype(np.float32),
    )


def other_knee(targets):
    return replace(targets, knee=np.ones_like(targets.knee))


def test_a_cache_that_was_cut_again_and_again_passes(tmp_path, teacher_path, data_path):
    """Each cut rounds the odds of what is not kept once more, by more than the fine steps of `exact`."""
    whole = path = dump_cache(tmp_path / "whole", teacher_path, data_path, tail="exact", top_p=0.999)
    for top_k in (100, 64, 50, 32, 16):
        recompress(path, tmp_path / str(top_k), top_k=top_k, tail="none" if path == whole else None)
        path = tmp_path / str(top_k)
    found = ask(path, teacher_path, data_path)
    assert found.mismatches == []
    assert ask(whole, teacher_path, data_path).bound < found.max_error < found.bound  # a false alarm, without
    assert found.bound == pytest.approx(1 / 256 + 6 / 64 + 0.01)
    keys = repack(path, 0, more_tail, step=1 / 256)
    assert {mismatch.key for mismatch in ask(path, teacher_path, data_path).mismatches} == keys


def test_cuts_are_counted_along_the_longest_way(tmp_path):
    write_cache(tmp_path / "a")
    assert cuts(Manifest.load(tmp_path / "a")) == 0
    recompress(tmp_path / "a", tmp_path / "b", top_k=16)
    recompress(tmp_path / "b", tmp_path / "c", top_k=8)
    keys = set(LogitCache(tmp_path / "c"))
    first = {min(keys)}
    part = select_samples(tmp_path / "c", tmp_path / "d", first)
    rest = select_samples(tmp_path / "c", tmp_path / "e", keys - first)
    merged = merge_caches([tmp_path / "d", tmp_path / "e"], tmp_path / "m")
    assert [cuts(manifest) for manifest in (part, rest, merged)] == [2, 2, 2]
    recompress(tmp_path / "m", tmp_path / "n", top_k=4)
    assert cuts(Manifest.load(tmp_path / "n")) == 3


@pytest.mark.parametrize("change", [shifted, other_ids, more_tail, least_for_most, other_knee])
def test_altered_values_are_seen(plain, tmp_path, teacher_path, data_path, change):
    path = copied(plain, tmp_path / "c")
    keys = repack(path, 1, change)
    found = ask(path, teacher_path, data_path)
    assert {mismatch.key for mismatch in found.mismatches} == keys, found.mismatches


def other_codes(targets):
    codes = targets.sketch.coordinates.copy()
    codes[:, 0] += 9
    return replace(targets, sketch=replace(targets.sketch, coordinates=codes))


def other_shift(targets):
    shift = (targets.sketch.shift + 9).astype(np.int16)
    return replace(targets, sketch=replace(targets.sketch, shift=shift))


@pytest.mark.parametrize("change", [other_codes, other_shift])
def test_altered_sketch_codes_are_seen(skipping_cache, tmp_path, teacher_path, broken_data, change):
    path = copied(skipping_cache, tmp_path / "c")
    keys = repack(path, 1, change)
    found = ask(path, teacher_path, broken_data)
    assert {mismatch.key for mismatch in found.mismatches} == keys, found.mismatches
    assert all("tail sketch" in mismatch.problem for mismatch in found.mismatches)
    assert found.max_code_error == 9


@pytest.mark.slow
def test_an_altered_sketch_is_no_encoder_of_these_codes(skipping_cache, tmp_path, teacher_path, broken_data):
    """The sketch's own file, packed again with another analysis matrix."""
    path = copied(skipping_cache, tmp_path / "c")
    file = path / "sketch.zarr.zip"
    names = (
        "basis",
        "basis_step",
        "offset",
        "unit",
        "centroids",
        "softcap",
        "analysis",
        "mean",
        "common",
        "numbers",
    )
    arrays = read_arrays(file, names, {})
    content = pack_arrays(
        {**arrays, "analysis": 9 * arrays["analysis"]},
        {"format": "cachekd-sketch", "format_version": 1},
    )
    file.write_bytes(content)
    info = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    reseal(path / "manifest.json", lambda values: values["sketches"][0].update(info))
    assert verify_files(path) == []
    assert len(ask(path, teacher_path, broken_data).mismatches) > 6


def test_changed_data_are_named(plain, tmp_path, teacher_path):
    members = tar_members(12)
    members[8] = (members[8][0], png_bytes(noise_image(99)))
    name, record = members[11]
    members[11] = (name, record.replace(b"yes", b"never").replace(b"red", b"blue").replace(b"no", b"yes"))
    members[14] = (members[14][0], b"not a png")
    del members[18:20]
    write_tar(tmp_path / "d" / "0.tar", members)
    found = ask(plain, teacher_path, tmp_path / "d")
    problems = dict(found.mismatches)
    assert problems["s004"] == "its text or images have changed"
    assert problems["s005"] == "its answer tokens are others"
    assert "cannot be read" in problems["s007"]
    assert set(problems) == {"s004", "s005", "s007"}
    assert (found.samples, found.all_samples, found.absent) == (11, 11, 1)


@pytest.mark.slow
def test_a_merged_cache_is_asked_for_what_the_data_hold(tmp_path, skipping_cache, teacher_path, broken_data):
    data = write_data(tmp_path / "d", 8, start=40)
    merge_caches([skipping_cache, dump_cache(tmp_path / "o", teacher_path, data)], tmp_path / "m")
    found = ask(tmp_path / "m", teacher_path, data, 3)
    assert (found.samples, found.all_samples, found.absent, found.mismatches) == (3, 8, 13, [])
    assert ask(tmp_path / "m", teacher_path, broken_data).mismatches == []


@pytest.mark.slow
def test_the_choice_is_random_and_can_be_repeated(plain, teacher_path, data_path, tmp_path):
    path = copied(plain, tmp_path / "c")
    repack(path, 1, other_ids)

    def named(**options) -> set[str]:
        return {mismatch.key for mismatch in ask(path, teacher_path, data_path, 5, **options).mismatches}

    assert named(seed=1) == named(seed=1)
    assert len({frozenset(named(seed=seed)) for seed in range(3)}) > 1


def test_what_cannot_be_asked_is_refused(plain, teacher_path, data_path, tmp_path):
    with pytest.raises(CachekdError, match="nothing would be asked"):
        ask(plain, teacher_path, data_path, 0)
    with pytest.raises(CachekdError, match="none of the cache's samples"):
        ask(plain, teacher_path, write_data(tmp_path / "d", 4, start=80))
    other = save_vlm(tmp_path / "t", tiny_processor(), text_width=48, vision_layers=3, seed=9)
    with pytest.raises(CachekdError, match="different teacher's weights"):
        ask(plain, other, data_path)


@pytest.mark.parametrize(("everything", "asked"), [(9, 3), (10, 10), (12, 1), (8, 7)])
def test_detection_equals_counting(everything, asked):
    """Over all choices of samples, how many meet a bad one."""
    found = Recheck(asked, everything, 0, 0, 0.0, 0.0, 0.0, 0.0, [])
    for share in (0.01, 0.1, 0.25, 0.5, 1.0):
        bad = max(1, round(share * everything))
        choices = list(itertools.combinations(range(everything), asked))
        met = sum(any(sample < bad for sample in choice) for choice in choices)
        assert found.detection(share) == pytest.approx(met / len(choices))


def test_detection_of_a_large_cache():
    found = Recheck(64, 1_000_000, 0, 0, 0.0, 0.0, 0.0, 0.0, [])
    assert found.detection(0.05) == pytest.approx(1 - 0.95**64, abs=1e-4)


def test_the_command_asks_again_and_says_how_sure_one_can_be(plain, tmp_path, teacher_path, data_path):
    args = (plain, "--teacher", teacher_path, "--data", data_path, "--sample", 4)
    result = CliRunner().invoke(app, ["verify", *map(str, args)])
    assert result.exit_code == 0
    assert "4 of 12" in result.output
    assert "probability" in result.output
    told = json.loads(verify(*args).stdout)["teacher"]
    assert told["samples"] == 4
    assert set(told["detection"]) == {"0.01", "0.02", "0.05", "0.1"}
    path = copied(plain, tmp_path / "c")
    repack(path, 1, other_ids)
    args = (path, "--teacher", teacher_path, "--data", data_path)
    result = verify(*args)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    result = CliRunner().invoke(app, ["verify", *map(str, args)])
    assert result.exit_code == 1
    assert "'s006' a kept logprob" in result.output


# ---- training


def test_the_switched_paths_teacher_must_be_the_caches(
    tmp_path, student_path, data_path, teacher_path, cache_path
):
    config = TrainConfig(
        student=str(student_path),
        teacher="",
        data=data_path,
        cache=cache_path,
        out=tmp_path / "run",
        epochs=1,
    )
    stored = LogitCache(cache_path).manifest
    other = save_vlm(tmp_path / "weights", tiny_processor(), text_width=48, vision_layers=3, seed=9)
    with pytest.raises(CachekdError, match="different teacher's weights") as caught:
        train(config.model_copy(update={"teacher": str(other)}))
    assert f"expected: teacher's weights {stored.teacher.weights_sha256}" in str(caught.value)
    other = shutil.copytree(teacher_path, tmp_path / "config")
    values = json.loads((other / "config.json").read_text())
    values["text_config"]["rms_norm_eps"] = 0.5
    (other / "config.json").write_text(json.dumps(values))
    with pytest.raises(CachekdError, match="different teacher's configuration") as caught:
        train(config.model_copy(update={"teacher": str(other)}))
    assert stored.teacher.config_sha256 in str(caught.value)
    other = shutil.copytree(teacher_path, tmp_path / "images")
    processor = tiny_processor()
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(other)
    with pytest.raises(CachekdError, match="different image processing") as caught:
        train(config.model_copy(update={"teacher": str(other)}))
    assert stored.fingerprints.image_processor in str(caught.value)
    assert not config.out.exists()
    moved = shutil.copytree(teacher_path, tmp_path / "moved")  # the same model in another folder
    assert train(config.model_copy(update={"teacher": str(moved)})).steps == 1
