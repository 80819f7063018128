"""A repair deletes what the same dump makes again, no more; the teacher sees what checksums cannot."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cachekd.cache import Finding, LogitCache, Manifest, verify_files
from cachekd.cache import repair as module
from cachekd.cache.build import dump_status
from cachekd.cache.container import pack_arrays, read_arrays
from cachekd.cache.derive import merge_caches
from cachekd.cache.layout import VOCABULARY_FILE
from cachekd.cache.recompress import cuts, recompress
from cachekd.cache.repair import Repaired
from cachekd.cache.vocabulary import pack_vocabulary
from cachekd.config import DataOptions, TrainConfig
from cachekd.data import open_samples
from cachekd.dump.plan import require_same_code
from cachekd.dump.recheck import Recheck, recheck
from cachekd.dump.run import load_teacher, teacher_files
from cachekd.errors import CachekdError
from cachekd.lock import alone
from cachekd.train import train
from cachekd.vocabulary import TokenBytes
from cachekd_cli.main import app
from caches import (
    copied,
    dump_cache,
    files_of,
    flip,
    repack,
    replace_vocabulary,
    reseal,
    select_samples,
    times_of,
    write_cache,
    write_data,
)
from tiny import noise_image, png_bytes, save_vlm, tar_members, tiny_processor, write_tar

PARTS_OF_A_SHARD = (("shards", ".zarr.zip"), ("dump", ".json"))


@pytest.fixture
def cache(tmp_path, skipping_cache) -> Path:
    return copied(skipping_cache, tmp_path / "c")


def verify(*args: object) -> Any:
    """The command, with --json; a CachekdError is raised."""
    result = CliRunner().invoke(app, ["verify", *map(str, args), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def repair(path: Path) -> tuple[dict[str, Any], Callable[[], None]]:
    """The command deletes something; what it tells, and the dump that it asks for."""
    result = verify(path, "--repair")
    told = json.loads(result.stdout)
    assert result.exit_code == 1
    assert told["ok"] is False
    first, *arguments = shlex.split(told["run"])
    assert first == "cachekd"

    def dump_again() -> None:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, (done.output, done.exception)

    return told, dump_again


def run_repair(path: Path, findings: list[Finding]) -> Repaired:
    return module.repair(path, findings, lambda plan: require_same_code(plan, path))


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


BROKEN = [{1: "flip"}, {0: "cut", 2: "gone"}, {0: "gone", 1: "gone", 2: "flip"}]


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_the_same_dump_makes_again_what_a_repair_deletes(cache, teacher_path, broken_data, broken):
    whole, times = files_of(cache), times_of(cache)
    files = {break_shard(cache, number, how) for number, how in broken.items()}
    told, dump_again = repair(cache)
    lost = {f"{folder}/{file.name[:5]}{end}" for file in files for folder, end in PARTS_OF_A_SHARD}
    left = files_of(cache)
    assert left == {name: content for name, content in whole.items() if name in left}  # nothing was changed
    assert set(whole) - set(left) == lost | {"manifest.json"}
    assert {line.split(":")[0] for line in told["repaired"]} == {
        *(f"shards/{file.name}" for file in files),
        "manifest.json",
    }
    with pytest.raises(CachekdError, match="did not finish"):
        LogitCache(cache)
    assert dump_status(cache).finished is False
    dump_again()
    assert files_of(cache) == whole
    changed = {name for name, time in times_of(cache).items() if time != times[name]}
    assert changed == lost | {"manifest.json"}


@pytest.mark.parametrize(
    "settings",
    [
        {"limit": 9, "tail": "none", "top_p": 0.5},
        pytest.param({"shuffle_seed": 3, "max_tokens": 900, "too_long": "cut"}, marks=pytest.mark.slow),
        {"limit": 14, "shuffle_seed": 5, "on_error": "skip", "workers": 1, "window": 64},
        {"disk_budget": "60kB", "top_k": 100},
    ],
    ids=str,
)
def test_the_command_says_all_that_the_dump_was_told(
    tmp_path, teacher_path, data_path, broken_data, settings
):
    """Data whose name a shell would take apart, too."""
    data = broken_data if "on_error" in settings else shutil.copytree(data_path, tmp_path / "my data")
    path = dump_cache(tmp_path / "c", teacher_path, data, **settings)
    whole = files_of(path)
    for number in (0, len(Manifest.load(path).shards) - 1):
        break_shard(path, number, "flip")
    told, dump_again = repair(path)
    assert f"--data {shlex.quote(str(data))} " in told["run"]
    dump_again()
    assert files_of(path) == whole


def test_the_command_is_shown(cache):
    break_shard(cache, 1, "flip")
    result = CliRunner().invoke(app, ["verify", str(cache), "--repair"])
    assert result.exit_code == 1
    assert (
        "shards/00001.zarr.zip: deleted, with its record: it differs from what was written" in result.output
    )
    assert result.output.splitlines()[-1].startswith("cachekd dump --data ")


@pytest.mark.parametrize("allowed", [1, 2, 4])
def test_a_repair_that_is_killed_is_gone_on_with(cache, teacher_path, broken_data, allowed, monkeypatch):
    """After some deletions, and by either: a repair again, or the dump and then a repair."""
    whole, left = files_of(cache), allowed
    for number in (0, 1):
        break_shard(cache, number, "flip")
    findings = verify_files(cache)

    def unlink(file: Path, missing_ok: bool = False) -> None:
        nonlocal left
        if not file.name.startswith("."):  # the lock
            if not left:
                raise KeyboardInterrupt
            left -= 1
        os.unlink(file)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            run_repair(cache, findings)
    gone = set(whole) - set(files_of(cache))
    assert len(gone) == allowed
    assert "manifest.json" not in gone
    other = copied(cache, cache.with_name("other"))
    repair(cache)[1]()
    assert files_of(cache) == whole
    dump_cache(other, teacher_path, broken_data, on_error="skip")
    if verify_files(other):
        repair(other)[1]()
    assert files_of(other) == whole


def test_a_repair_works_alone(cache):
    break_shard(cache, 1, "flip")
    before = files_of(cache)
    with alone(cache, "trains in"), pytest.raises(CachekdError, match="another process writes into"):
        verify(cache, "--repair")
    assert files_of(cache) == before


def test_a_shard_that_was_put_back_meanwhile_is_left_alone(cache):
    whole = files_of(cache)
    for number in (0, 1):
        break_shard(cache, number, "flip")
    findings = verify_files(cache)
    (cache / "shards" / "00000.zarr.zip").write_bytes(whole["shards/00000.zarr.zip"])
    repaired = run_repair(cache, findings)
    assert [line.split(":")[0] for line in repaired.done] == ["shards/00001.zarr.zip", "manifest.json"]
    assert files_of(cache).keys() >= {"shards/00000.zarr.zip", "dump/00000.json"}


def test_nothing_is_deleted_where_the_dump_would_not_go_on(cache):
    """With other libraries it refuses its own folder."""
    reseal(cache / "manifest.json", lambda values: values["sources"][0]["versions"].update(torch="0.1"))
    break_shard(cache, 1, "flip")
    before = files_of(cache)
    with pytest.raises(CachekdError, match="made with a different torch") as caught:
        verify(cache, "--repair")
    assert caught.value.expected == "torch 0.1"
    assert files_of(cache) == before


def test_a_broken_sketch_is_refused(cache):
    flip(cache / "sketch.zarr.zip", 3000)
    break_shard(cache, 1, "flip")
    before = files_of(cache)
    with pytest.raises(CachekdError, match="tail sketch cannot be made again"):
        verify(cache, "--repair")
    flip(cache / "manifest.json", 300)  # nor by the records
    before = files_of(cache)
    with pytest.raises(CachekdError, match=r"sketch\.zarr\.zip"):
        verify(cache, "--repair")
    assert files_of(cache) == before


def test_what_no_dump_makes_again_is_left_with_what_to_run(cache, tmp_path, teacher_path):
    other = dump_cache(tmp_path / "o", teacher_path, write_data(tmp_path / "d", 8, start=40))
    merge_caches([cache, other], tmp_path / "merged")
    select_samples(cache, tmp_path / "selected", {"s001", "s002"})
    recompress(cache, tmp_path / "recompressed", top_k=16)
    shutil.rmtree(copied(cache, tmp_path / "fetched") / "dump")
    write_cache(tmp_path / "one-by-one")
    parent = str(Manifest.load(cache).sha256)[:12]
    expected = {
        "merged": (
            "made of others",
            "`cachekd merge CACHE CACHE -o NEW`. Their manifests have sha256 " + parent,
        ),
        "selected": ("made of others", "`cachekd select CACHE -o NEW, with the same conditions`"),
        "recompressed": ("made of others", "`cachekd recompress CACHE NEW --top-k 16 --tail bytes=64`"),
        "fetched": ("was fetched", "`cachekd pull ADDRESS"),
        "one-by-one": ("one by one", "by the program that wrote it"),
    }
    for name, (why, fix) in expected.items():
        path = tmp_path / name
        file = path / "shards" / Manifest.load(path).shards[0].name
        content = file.read_bytes()
        file.unlink()  # not through a hard link
        file.write_bytes(content[:-9])
        before = files_of(path)
        with pytest.raises(CachekdError, match=why) as caught:
            verify(path, "--repair")
        assert fix in str(caught.value.fix), caught.value.fix
        assert files_of(path) == before


# ---- manifest, plan, records, skipped.jsonl: each is written again from the others


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


def test_manifest_and_shards_at_once(cache):
    whole = files_of(cache)
    break_shard(cache, 1, "gone")
    break_shard(cache, 2, "flip")
    flip(cache / "manifest.json", 300)
    flip(cache / "skipped.jsonl", 30)
    repair(cache)[1]()
    assert files_of(cache) == whole


def test_shards_and_their_records_at_once(cache):
    whole = files_of(cache)
    break_shard(cache, 1, "flip")
    flip(cache / "dump" / "plan.json", 30)
    flip(cache / "dump" / "00001.json", 30)
    (cache / "dump" / "00000.json").unlink()
    repair(cache)[1]()
    assert files_of(cache) == whole


@pytest.mark.parametrize(
    "names",
    [
        ["dump/plan.json"],
        ["dump/00000.json"],
        ["dump/00001.json", "dump/00002.json", "dump/00003.json"],
        ["skipped.jsonl"],
        ["dump/plan.json", "dump/00000.json", "dump/00001.json", "dump/00002.json", "dump/00003.json"],
    ],
)
@pytest.mark.parametrize("how", ["flip", "gone", "empty"])
def test_plan_records_and_skipped_come_back(cache, names, how):
    if how == "gone" and len(names) == 5:
        return  # a cache without dump/ is whole
    whole = files_of(cache)
    for name in names:
        if how == "flip":
            flip(cache / name, 30)
        elif how == "gone":
            (cache / name).unlink()
        else:
            (cache / name).write_bytes(b"")
    told = json.loads(verify(cache, "--repair").stdout)
    assert told["ok"], told
    assert len(told["repaired"]) == len(names)
    assert files_of(cache) == whole


def test_what_cannot_be_restored_is_explained(cache):
    whole = files_of(cache)
    flip(cache / "skipped.jsonl", 20)
    flip(cache / "dump" / "00001.json", 100)
    with pytest.raises(CachekdError, match=r"skipped\.jsonl is damaged, and the dump's records"):
        verify(cache, "--repair")
    flip(cache / "dump" / "plan.json", 30)
    with pytest.raises(CachekdError, match=r"skipped\.jsonl is damaged, and the dump's records"):
        verify(cache, "--repair")
    flip(cache / "manifest.json", 300)
    before = files_of(cache)
    with pytest.raises(CachekdError, match="the manifest cannot be written again"):
        verify(cache, "--repair")
    assert files_of(cache) == before
    (cache / "dump" / "plan.json").write_bytes(whole["dump/plan.json"])
    (cache / "sketch.zarr.zip").unlink()
    with pytest.raises(CachekdError, match=r"sketch\.zarr\.zip"):
        verify(cache, "--repair")


def test_a_record_that_is_lost_with_the_manifest_is_made_again(cache):
    whole = files_of(cache)
    flip(cache / "manifest.json", 300)
    flip(cache / "dump" / "00001.json", 100)
    repair(cache)[1]()
    assert files_of(cache) == whole


def test_a_lost_last_record_is_noticed(tmp_path):
    """Where samples were added one by one, nothing says how many shards there were but the shards."""
    path = write_cache(tmp_path / "c", 6, shard_tokens=4)
    last = max((path / "dump").glob("0*.json"))
    last.unlink()
    flip(path / "manifest.json", 300)
    before = files_of(path)
    with pytest.raises(CachekdError, match="cannot be written again"):
        verify(path, "--repair")
    assert files_of(path) == before


def test_a_folder_without_its_plan_loses_nothing(cache):
    """The dump would take what is left for something else's; nor are records of another cache taken away."""
    break_shard(cache, 1, "flip")
    kept = {file: file.read_bytes() for file in (cache / "dump").iterdir()}
    for file in kept:
        file.unlink()
    before = files_of(cache)
    with pytest.raises(CachekdError, match="no dump goes on in this folder"):
        verify(cache, "--repair")
    for file, content in kept.items():
        file.write_bytes(content)
    (cache / "dump" / "00009.json").write_bytes(b"{}")
    with pytest.raises(CachekdError, match="a file of dump/ is not of this cache"):
        verify(cache, "--repair")
    left = files_of(cache).keys()
    assert left == before.keys() | {f"dump/{file.name}" for file in kept} | {"dump/00009.json"}


def test_repair_of_a_sound_cache_does_nothing(cache):
    times = times_of(cache)
    assert json.loads(verify(cache, "--repair").stdout)["repaired"] == []
    assert times_of(cache) == times


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_the_same_dump_makes_the_vocabulary_again(cache, teacher_path, broken_data, how, with_manifest):
    whole, times = files_of(cache), times_of(cache)
    if how == "flip":
        flip(cache / VOCABULARY_FILE, 900)
    elif how == "cut":
        (cache / VOCABULARY_FILE).write_bytes(whole[VOCABULARY_FILE][:-5])
    else:
        (cache / VOCABULARY_FILE).unlink()
    if not with_manifest:
        flip(cache / "manifest.json", 400)
    told, dump_again = repair(cache)
    assert {line.split(":")[0] for line in told["repaired"]} == {VOCABULARY_FILE, "manifest.json"}
    assert set(whole) - set(files_of(cache)) == {VOCABULARY_FILE, "manifest.json"}
    dump_again()
    assert files_of(cache) == whole
    changed = {name for name, time in times_of(cache).items() if time != times[name]}
    assert changed == {VOCABULARY_FILE, "manifest.json"}


def test_no_vocabulary_is_deleted_of_a_cache_that_was_made_of_others(tmp_path, skipping_cache):
    select_samples(skipping_cache, tmp_path / "s", {"s000"})
    content = (tmp_path / "s" / VOCABULARY_FILE).read_bytes()
    (tmp_path / "s" / VOCABULARY_FILE).unlink()
    (tmp_path / "s" / VOCABULARY_FILE).write_bytes(content[:-1])
    with pytest.raises(CachekdError, match="no dump makes a file of it again"):
        verify(tmp_path / "s", "--repair")
    assert (tmp_path / "s" / VOCABULARY_FILE).read_bytes() == content[:-1]


# ---- ask again


def ask(path: Path, teacher: Path, data: Path, count: int = 99, **options: Any) -> Recheck:
    cache, samples = LogitCache(path), open_samples(data)
    files = teacher_files(str(teacher), DataOptions.of(data))
    model = load_teacher(files, samples, "skip", cache.manifest.codec, "float32")
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
    assert "chance to find one" in result.output
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


def test_a_vocabulary_that_is_not_the_teachers_is_seen(plain, tmp_path, teacher_path, data_path):
    """A table that is sound in itself, and not the teacher's."""
    cache = copied(plain, tmp_path / "c")
    assert ask(cache, teacher_path, data_path, 2).ok
    table = LogitCache(cache).vocabulary
    other = TokenBytes((*table.contents[:-1], b" gree"), table.special, table.end_of_turn)
    replace_vocabulary(cache, pack_vocabulary(other, len(table)).content)
    assert verify_files(cache) == []
    found = ask(cache, teacher_path, data_path, 2)
    assert (found.ok, found.mismatches) == (False, [])
    last = len(table) - 1
    assert found.vocabulary == (
        f"id {last} is b' gree', the tokenizer says: id {last} is {table.contents[-1]!r}"
    )
    args = [str(cache), "--teacher", str(teacher_path), "--data", str(data_path), "--sample", "2"]
    result = CliRunner().invoke(app, ["verify", *args])
    assert result.exit_code == 1
    assert "the vocabulary id" in result.output
    assert json.loads(verify(*args).stdout)["ok"] is False
