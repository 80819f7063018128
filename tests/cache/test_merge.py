"""Merged caches: every sample as it was, each with the tail sketch that it was coded with."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cachekd.cache import CachedTargets, LogitCache, LogitCacheWriter, Manifest, verify_files
from cachekd.cache.derive import link, merge_caches
from cachekd.cache.plan import read_skipped
from cachekd.cache.tail.merged import MergedTail, join_sketch_tails
from cachekd.cache.tail.sketch import SketchTail
from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.losses import dbild_loss
from cachekd.train import train
from cachekd_cli.main import app
from caches import (
    assert_same_samples,
    copied,
    dump_cache,
    files_of,
    flip,
    header,
    sample,
    select_samples,
    times_of,
    write_data,
)
from tiny import save_vlm, tiny_processor


@pytest.fixture(scope="module")
def parts(tmp_path_factory, teacher_path) -> list[Path]:
    """Three dumps with a sketch each, of data that have nothing in common."""
    folder = tmp_path_factory.mktemp("parts")
    found = []
    for number, (start, count) in enumerate([(0, 14), (20, 9), (40, 8)]):
        data = write_data(folder / f"data{number}", count, start=start)
        found.append(dump_cache(folder / f"c{number}", teacher_path, data))
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory, teacher_path, parts) -> list[Path]:
    """Two of the same dumps without a sketch."""
    folder = tmp_path_factory.mktemp("plain")
    return [
        dump_cache(folder / name, teacher_path, parts[0].parent / f"data{name}", tail="none") for name in "01"
    ]


@pytest.fixture(scope="module")
def merged(tmp_path_factory, parts) -> Path:
    out = tmp_path_factory.mktemp("merged") / "m"
    merge_caches(parts, out)
    return out


def test_every_sample_is_as_it_was(merged, parts, plain, tmp_path):
    assert_same_samples(merged, *parts)
    manifest = LogitCache(merged).manifest
    assert list(LogitCache(merged)) == [key for part in parts for key in LogitCache(part)]
    assert (len(manifest.sketches), len(manifest.sources)) == (3, 3)
    assert len({sketch.sha256 for sketch in manifest.sketches}) == 3  # or the test would show little
    assert manifest.tokens == sum(Manifest.load(part).tokens for part in parts)
    assert manifest.fidelity.tokens == sum(Manifest.load(part).fidelity.tokens for part in parts)
    merge_caches(plain, tmp_path / "plain")
    assert_same_samples(tmp_path / "plain", *plain)
    assert Manifest.load(tmp_path / "plain").sketches == []
    for path in (merged, tmp_path / "plain"):
        assert verify_files(path) == []


def test_no_shard_is_rewritten(merged, parts):
    """The same files, where the file system can do that, and the parts are left alone."""
    olds = [part / "shards" / info.name for part in parts for info in Manifest.load(part).shards]
    news = [merged / "shards" / info.name for info in Manifest.load(merged).shards]
    assert len(olds) == len(news)
    for old, new in zip(olds, news, strict=True):
        assert old.stat().st_ino == new.stat().st_ino


def test_links_are_followed_and_other_file_systems_get_copies(tmp_path, monkeypatch):
    real = tmp_path / "blobs" / "x"
    real.parent.mkdir()
    real.write_bytes(b"content")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "x").symlink_to("../blobs/x")  # as the hub's cache has them
    link(tmp_path / "snapshot" / "x", tmp_path / "new")
    assert not (tmp_path / "new").is_symlink()
    assert (tmp_path / "new").read_bytes() == b"content"

    def refuse(*_args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    link(tmp_path / "snapshot" / "x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"
    with pytest.raises(CachekdError, match="cannot be read"):
        link(tmp_path / "missing", tmp_path / "other")


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the last bits, which in a matrix product depend on the number of rows."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def alternating(merged: Path, parts: list[Path]) -> tuple[list[CachedTargets], list[CachedTargets]]:
    """Samples of all parts in turn, from the merged cache and from the parts themselves."""
    cache, caches = LogitCache(merged), [LogitCache(part) for part in parts]
    pairs = [
        (key, part) for keys in zip(*caches, strict=False) for key, part in zip(keys, caches, strict=True)
    ]
    return [cache[key] for key, _ in pairs[:12]], [part[key] for key, part in pairs[:12]]


def student_logits(targets: CachedTargets, seed: int = 0) -> torch.Tensor:
    shape = (len(targets), targets.vocab_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_a_batch_of_several_sketches_is_the_sum_of_its_samples(merged, parts):
    mixed, alone = alternating(merged, parts)
    batch = CachedTargets.cat(mixed)
    assert isinstance(batch.tail, MergedTail)
    assert len(batch.tail.parts) == 3
    assert_close(batch.everywhere(), torch.cat([targets.everywhere() for targets in alone]))
    ids = torch.randint(0, batch.vocab_size, (len(batch), 7), generator=torch.Generator().manual_seed(0))
    by_sample = ids.split([len(targets) for targets in alone])
    expected = torch.cat([targets.gather(some) for targets, some in zip(alone, by_sample, strict=True)])
    assert_close(batch.gather(ids), expected)

    whole = student_logits(batch)
    loss = dbild_loss(whole, batch, window=batch.window, min_k=batch.min_k, reduction="sum")
    loss.backward()
    single = whole.detach().clone().requires_grad_()
    pieces = single.split([len(targets) for targets in alone])
    losses = [
        dbild_loss(piece, targets, window=batch.window, min_k=batch.min_k, reduction="sum")
        for piece, targets in zip(pieces, alone, strict=True)
    ]
    torch.testing.assert_close(loss, sum(losses))
    sum(losses).backward()
    torch.testing.assert_close(whole.grad, single.grad)


def test_mixed_batches_travel_and_are_cut(merged, parts):
    mixed, alone = alternating(merged, parts)
    batch = CachedTargets.cat(mixed)
    expected = batch.everywhere()
    for other in (pickle.loads(pickle.dumps(batch)), batch.to("cpu"), CachedTargets.cat([batch])):
        assert_close(other.everywhere(), expected)
    basis = batch.tail.parts[0].sketch.codes.numpy().tobytes()
    assert basis[:200] not in pickle.dumps(batch)  # the codes travel, not the sketches
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    assert_close(batch.select(order).everywhere(), expected[order])
    assert batch.select(order[:0]).everywhere().shape == (0, batch.vocab_size)
    # Joined again, in pieces that are mixed, permuted, or of one sketch only.
    pieces = [batch.select(order[:9]), alone[0], batch.select(order[9:])]
    again = CachedTargets.cat(pieces)
    assert_close(
        again.everywhere(), torch.cat([expected[order[:9]], alone[0].everywhere(), expected[order[9:]]])
    )


def test_a_sketch_that_was_read_twice_is_one(parts):
    cache = LogitCache(parts[0])
    first, second = (cache[key] for key in list(cache)[:2])
    twice = pickle.loads(pickle.dumps(second)).tail
    twice = SketchTail(replace(twice.sketch, _basis=[], _copies={}), twice.coordinates, twice.shift)
    assert twice.sketch is not first.tail.sketch
    joined = join_sketch_tails([first.tail, twice])
    assert isinstance(joined, SketchTail)
    vocab = first.vocab_size
    assert_close(
        joined.everywhere(vocab), torch.cat([first.tail.everywhere(vocab), second.tail.everywhere(vocab)])
    )
    # Two parts that turn out to be of one sketch, their tokens interleaved.
    size = len(first.tail.shift) + len(twice.shift)
    part = torch.arange(size) % 2
    place = torch.arange(size) // 2 % min(len(first.tail.shift), len(twice.shift))
    odd = MergedTail((first.tail, twice), part, place)
    assert_close(join_sketch_tails([odd]).everywhere(vocab), odd.everywhere(vocab))


def test_training_on_a_merged_cache_runs(tmp_path, merged, parts, teacher_path, student_path):
    """Batches mix what has three sketches; in worker processes, too."""
    data = tmp_path / "data"
    for number in range(3):
        data.mkdir(exist_ok=True)
        shutil.copy(parts[0].parent / f"data{number}" / "0.tar", data / f"{number}.tar")
    config = TrainConfig(
        student=str(student_path), teacher=str(teacher_path), data=data, cache=merged, out=tmp_path / "run"
    )
    summary = train(config.model_copy(update={"batch_size": 8, "epochs": 1, "workers": 1}))
    assert summary.steps == 4
    assert all(torch.isfinite(torch.tensor(value)) for value in summary.terms.values())


def test_merging_what_was_merged(tmp_path, merged, parts, teacher_path):
    data = write_data(tmp_path / "data", 5, start=60)
    other = dump_cache(tmp_path / "other", teacher_path, data)
    merge_caches([other, merged], tmp_path / "all")
    assert_same_samples(tmp_path / "all", other, *parts)
    assert verify_files(tmp_path / "all") == []
    manifest = Manifest.load(tmp_path / "all")
    assert [len(manifest.sketches), len(manifest.sources)] == [4, 4]
    assert [sketch.name for sketch in manifest.sketches] == [
        "sketch.zarr.zip",
        *(f"sketch-{number}.zarr.zip" for number in (1, 2, 3)),
    ]


def test_a_cut_merged_with_its_complement_is_the_original(tmp_path, skipping_cache):
    keys = list(LogitCache(skipping_cache))
    some = set(keys[2:9])
    select_samples(skipping_cache, tmp_path / "some", some)
    select_samples(skipping_cache, tmp_path / "rest", set(keys) - some)
    merge_caches([tmp_path / "some", tmp_path / "rest"], tmp_path / "all")
    assert_same_samples(tmp_path / "all", skipping_cache)
    assert set(LogitCache(tmp_path / "all")) == set(keys)
    old, new = Manifest.load(skipping_cache), Manifest.load(tmp_path / "all")
    assert new.sketches == old.sketches
    assert new.sources == old.sources
    assert new.skipped == old.skipped  # each sample once
    assert verify_files(tmp_path / "all") == []


def test_what_one_cache_skipped_and_another_has_is_not_left_out(tmp_path, skipping_cache, teacher_path):
    """The bad sample was mended, and dumped by itself."""
    data = write_data(tmp_path / "data", 1, start=7)
    merge_caches([skipping_cache, dump_cache(tmp_path / "one", teacher_path, data)], tmp_path / "m")
    manifest = Manifest.load(tmp_path / "m")
    assert [skipped.key for skipped in read_skipped(tmp_path / "m", manifest.skipped)] == [
        f"s{index:03d}" for index in range(12, 18)
    ]
    assert "s007" in LogitCache(tmp_path / "m")


# ---- refusals


def assert_refused(paths: list[Path], out: Path, *says: str) -> str:
    before = [files_of(path) for path in paths]
    with pytest.raises(CachekdError) as caught:
        merge_caches(paths, out)
    for text in says:
        assert text in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    assert [files_of(path) for path in paths] == before
    return str(caught.value)


@pytest.mark.slow
def test_another_teacher_tokenizer_template_or_codec_is_refused(tmp_path, parts, teacher_path):
    first, out = parts[0], tmp_path / "out"
    ours = Manifest.load(first)
    data = parts[0].parent / "data1"
    other = save_vlm(tmp_path / "t1", tiny_processor(), text_width=48, vision_layers=3, seed=9)
    theirs = dump_cache(tmp_path / "c1", other, data)
    assert_refused(
        [first, theirs],
        out,
        "different teacher's weights",
        f"expected: teacher's weights {ours.teacher.weights_sha256}",
        f"found: teacher's weights {Manifest.load(theirs).teacher.weights_sha256}",
        str(theirs),
    )
    corpus = ["zebra quagga okapi"] * 9
    other = save_vlm(tmp_path / "t2", tiny_processor(corpus=corpus), text_width=48, vision_layers=3, seed=1)
    theirs = dump_cache(tmp_path / "c2", other, data)
    told = assert_refused([first, theirs], out, ours.fingerprints.tokenizer, "tokenizer")
    assert Manifest.load(theirs).fingerprints.tokenizer in told
    for settings, name in (({"top_k": 16}, "setting top_k"), ({"tail": "step=0.5"}, "setting tail")):
        theirs = dump_cache(tmp_path / name, teacher_path, data, **settings)
        assert_refused([first, theirs], out, f"different {name}", "expected", "found")


def header_changes() -> list[tuple[str, dict]]:
    base = header()
    changed = {"weights_sha256": "x", "config_sha256": "x", "dtype": "bfloat16", "vocab_size": 98}
    found = [
        (name, {"teacher": base["teacher"].model_copy(update={name: value})})
        for name, value in changed.items()
    ]
    for name in ("tokenizer", "chat_template", "image_processor", "image_token"):
        found.append((name, {"fingerprints": base["fingerprints"].model_copy(update={name: "other"})}))
    for name, value in {"top_k": 31, "top_p": 0.98, "window": 63, "min_k": 3, "logprob_step": 0.125}.items():
        found.append((name, {"codec": base["codec"].model_copy(update={name: value})}))
    return found


@pytest.mark.parametrize(("name", "change"), header_changes(), ids=lambda value: str(value)[:15])
def test_every_fingerprint_and_setting_counts(tmp_path, name, change):
    for folder, changes, start in (("a", {}, 0), ("b", change, 3)):
        with LogitCacheWriter(tmp_path / folder, **{**header(), **changes}) as writer:
            for index in range(start, start + 3):
                writer.add(*sample(index))
    told = assert_refused([tmp_path / "a", tmp_path / "b"], tmp_path / "out", "was made with a different")
    assert sum(line.strip().startswith(("expected:", "found:")) for line in told.splitlines()) == 2


def test_common_keys_are_refused(tmp_path, parts, teacher_path):
    data = write_data(tmp_path / "data", 4, start=12)
    theirs = dump_cache(tmp_path / "c", teacher_path, data)
    assert_refused([parts[0], theirs], tmp_path / "out", "2 common keys, such as 's012'", "the same content")
    assert_refused([parts[0], parts[0]], tmp_path / "out", "14 common keys")
    assert_refused([parts[0]], tmp_path / "out", "two caches or more")


def test_keys_are_not_looked_for_in_each_other_cache(tmp_path, monkeypatch):
    """Of 64 caches of 20,000 samples that took two minutes."""
    paths = [tmp_path / str(number) for number in range(4)]
    for number, path in enumerate(paths):
        with LogitCacheWriter(path, **header()) as writer:
            writer.add(*sample(number))
    with monkeypatch.context() as patched:
        patched.setattr(LogitCache, "__contains__", lambda *_: pytest.fail("looked for"))
        assert merge_caches(paths, tmp_path / "out").samples == 4


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path, parts, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes").write_text("mine")
    before = times_of(taken)
    with pytest.raises(CachekdError, match="already holds something"):
        merge_caches(parts, taken)
    assert times_of(taken) == before
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        with pytest.raises(CachekdError):
            merge_caches(parts, out)
    broken = copied(parts[1], tmp_path / "broken")
    (broken / "sketch.zarr.zip").unlink()
    assert_refused([parts[0], broken], tmp_path / "out", "is missing")
    from cachekd.cache import derive

    def fail(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(derive, "write_skipped", fail)
    with pytest.raises(KeyboardInterrupt):
        merge_caches(parts, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file", "taken"]


@pytest.mark.slow
def test_damaged_skipped_is_refused_and_an_empty_folder_will_do(tmp_path, skipping_cache, parts, monkeypatch):
    broken = copied(skipping_cache, tmp_path / "broken")
    data_keys = set(LogitCache(parts[1]))
    assert not data_keys & set(LogitCache(broken))
    flip(broken / "skipped.jsonl", 20)
    assert_refused([parts[1], broken], tmp_path / "out", "skipped.jsonl is not what was written")
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    merge_caches(parts, Path("link"))
    assert_same_samples(tmp_path / "here", *parts)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    merge_caches(parts, Path("."))
    assert_same_samples(tmp_path / "empty", *parts)


# ---- the command


def test_merge_command(tmp_path, parts):
    result = CliRunner().invoke(app, ["merge", *map(str, parts), "-o", str(tmp_path / "[m]")])
    assert result.exit_code == 0, result.output
    assert "[m]: 31 samples" in result.output.replace("\n", "")
    args = ["merge", *map(str, parts), "--out", str(tmp_path / "j"), "--json"]
    result = CliRunner().invoke(app, args)
    assert json.loads(result.stdout)["samples"] == 31
    result = CliRunner().invoke(app, args)
    assert isinstance(result.exception, CachekdError)
    result = CliRunner().invoke(app, ["merge", str(parts[0]), "-o", str(tmp_path / "one")])
    assert "nothing to merge" in str(result.exception)
    assert CliRunner().invoke(app, ["merge", str(parts[0])]).exit_code == 2
