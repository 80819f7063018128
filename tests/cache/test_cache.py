"""The format: what goes in comes out, the same bytes every time, and damage is seen."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import pickle
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.cache import (
    CachedTargets,
    LogitCache,
    LogitCacheWriter,
    Manifest,
    TokenTargets,
    select_topk,
    verify_files,
)
from cachekd.cache.codec import (
    TAIL_STEP,
    decode_logprobs,
    decode_tail,
    encode_logprobs,
    encode_tail,
    rank_ids,
)
from cachekd.cache.shard import make_shard, pack_shard, read_shard
from cachekd.errors import CachekdError
from cachekd.losses import dbild_loss, kneedle_k
from cachekd.losses.targets import DenseTargets
from caches import GOLDEN, ROOT, VOCAB, header, logits_of, sample, write_cache


def assert_equal_records(a: TokenTargets, b: TokenTargets) -> None:
    for name in ("token_ids", "k", "knee", "ids", "logprobs", "tail_logmass"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert (a.sketch is None) == (b.sketch is None)
    if a.sketch is not None:
        assert np.array_equal(a.sketch.coordinates, b.sketch.coordinates)
        assert np.array_equal(a.sketch.shift, b.sketch.shift)


# ---- selection


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(2, 60),
    top_k=st.integers(2, 70),
    window=st.integers(2, 70),
    min_k=st.integers(2, 5),
    top_p=st.floats(0.05, 0.9999),
    scale=st.sampled_from([0.0, 0.01, 1.0, 4.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_selection_equals_its_definition(rows, vocab, top_k, window, min_k, top_p, scale, seed):
    logits = logits_of(rows, seed, vocab, scale)
    if vocab > 4:
        logits[0, 1] = float("-inf")
    chosen = select_topk(logits, torch.zeros(rows), top_k=top_k, window=window, min_k=min_k, top_p=top_p)
    start = 0
    for row in range(rows):
        logprobs = logits[row].double().log_softmax(-1)
        ordered = logprobs.sort(descending=True).values
        knee = int(kneedle_k(logits[row].log_softmax(-1).sort(descending=True).values[None, :window]))
        reach = next(
            (i + 1 for i in range(vocab) if float(ordered[: i + 1].exp().sum()) >= top_p - 1e-6), vocab
        )
        reach_above = next(
            (i + 1 for i in range(vocab) if float(ordered[: i + 1].exp().sum()) > top_p + 1e-6), vocab
        )
        finite = int(ordered.isfinite().sum())
        low, high = (min(top_k, finite, max(knee, min_k, least)) for least in (reach, reach_above))
        k = int(chosen.k[row])
        assert low <= k <= max(high, low)
        assert chosen.knee[row] == min(knee, k)
        ids = chosen.ids[start : start + k].astype(int)
        assert len(set(ids.tolist())) == k
        kept = chosen.logprobs[start : start + k]
        np.testing.assert_allclose(kept, ordered[:k], atol=1e-4)
        np.testing.assert_allclose(kept, logprobs[ids], atol=1e-4)
        rest = logprobs.clone()
        rest[ids] = float("-inf")
        np.testing.assert_allclose(chosen.tail_logmass[row], rest.logsumexp(-1), atol=1e-3)
        start += k
    assert start == len(chosen.ids)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_refused(bad):
    logits = logits_of(3, 0)
    logits[1, 5] = bad
    with pytest.raises(CachekdError, match="not finite") as caught:
        select_topk(logits, torch.zeros(3))
    assert "answer token 1" in str(caught.value)
    with pytest.raises(CachekdError, match="not finite"):
        select_topk(torch.full((1, 5), float("-inf")), torch.zeros(1))


def test_splitting_and_joining_records_is_lossless():
    parts = [sample(index)[1] for index in range(5)]
    again = TokenTargets.concatenate(parts).split([len(part) for part in parts])
    for part, back in zip(parts, again, strict=True):
        assert_equal_records(part, back)


# ---- codec


runs = st.lists(st.lists(st.floats(-300, 0, width=32), max_size=20), max_size=12)


@settings(max_examples=150, deadline=None)
@given(runs=runs, step=st.sampled_from([1 / 32, 0.1, 1 / 128, 1 / 256]))
def test_gaps_give_back_the_quantised_values(runs, step):
    runs = [sorted(run, reverse=True) for run in runs]
    k = np.array([len(run) for run in runs], dtype=np.uint16)
    values = np.array([value for run in runs for value in run], dtype=np.float32)
    gaps = encode_logprobs(values, k, step)
    assert gaps.dtype == np.uint16
    start = 0
    for run in runs:
        quantised = np.rint(-np.array(run, dtype=np.float32).astype(np.float64) / step)
        expected = np.minimum(np.diff(quantised, prepend=0.0), 65535)  # a run may go farther, a gap may not
        assert np.array_equal(gaps[start : start + len(run)], expected)
        start += len(run)


def test_what_nobody_targets_is_stored_at_the_farthest():
    """Banned ids: finite, but with no probability that a float could name."""
    values = np.array([-0.25, -1e9, np.finfo(np.float32).min], np.float32)
    assert encode_logprobs(values, np.array([3]), 1 / 16).tolist() == [4, 65531, 0]
    assert encode_logprobs(values, np.array([3]), 1.0).tolist() == [0, 65535, 0]
    assert encode_logprobs(values, np.array([3]), 1 / 256).tolist() == [64, 65535, 0]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0.0, 40.0),
    k=st.integers(1, VOCAB),
    step=st.sampled_from([1 / 32, 0.1]),
)
def test_decoded_logprobs_are_within_the_stated_bound_and_normalised(seed, scale, k, step):
    logprobs = logits_of(4, seed, scale=scale).double().log_softmax(-1).sort(descending=True).values.numpy()
    kept, rest = logprobs[:, :k], logprobs[:, k:]
    tail = np.array([np.logaddexp.reduce(row) if len(row) else -np.inf for row in rest], dtype=np.float32)
    counts, flat = np.full(4, k), kept.ravel().astype(np.float32)
    stored_tail, stored_kept = decode_tail(encode_tail(tail, flat, counts))
    decoded = decode_logprobs(encode_logprobs(flat, counts, step), counts, stored_kept, step).reshape(4, k)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - kept).max() <= step + TAIL_STEP / 2 + 1e-4
    inside = tail > -TAIL_STEP * (2**15 - 1)
    np.testing.assert_allclose(stored_tail[inside], tail[inside], atol=TAIL_STEP / 2 + 1e-4)
    total = np.exp(decoded.astype(np.float64)).sum(1) + np.exp(stored_tail.astype(np.float64))
    np.testing.assert_allclose(total, 1.0, atol=1e-5)


@given(st.lists(st.lists(st.integers(0, 60), max_size=9), min_size=1, max_size=9))
def test_ranked_ids_are_the_ids_by_frequency(runs):
    ids = np.array([i for run in runs for i in run], dtype=np.uint32)
    ranked, ranks = rank_ids(ids)
    assert np.array_equal(ranked[ranks], ids)
    counts = [int((ids == i).sum()) for i in ranked]
    assert counts == sorted(counts, reverse=True)


# ---- targets


def slow_gather(records: TokenTargets, ids: np.ndarray, vocab: int) -> np.ndarray:
    """A dictionary per token."""
    rows, start = [], 0
    for row, k in enumerate(records.k.astype(int)):
        stored = dict(
            zip(records.ids[start : start + k].tolist(), records.logprobs[start : start + k], strict=True)
        )
        with np.errstate(divide="ignore"):
            other = records.tail_logmass[row] - np.log(max(vocab - k, 1))
        rows.append([stored.get(int(i), other) for i in ids[row]])
        start += k
    return np.array(rows, dtype=np.float32)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6), top_k=st.integers(2, VOCAB), columns=st.integers(1, 30), seed=st.integers(0, 999)
)
def test_gather_equals_a_dictionary(rows, top_k, columns, seed):
    records = select_topk(logits_of(rows, seed), torch.zeros(rows), top_k=top_k, top_p=0.9999)
    targets = CachedTargets.from_sparse(records, vocab_size=VOCAB, window=128, min_k=2)
    ids = torch.randint(0, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed))
    np.testing.assert_allclose(
        targets.gather(ids).numpy(), slow_gather(records, ids.numpy(), VOCAB), atol=1e-5
    )


def test_cat_equals_one_by_one():
    parts = [
        CachedTargets.from_sparse(sample(i, top_k=4 + 5 * i)[1], vocab_size=VOCAB, window=64, min_k=2)
        for i in range(4)
    ]
    together = CachedTargets.cat(parts)
    everything = torch.arange(VOCAB)
    assert torch.equal(
        together.gather(everything.expand(len(together), -1)),
        torch.cat([part.gather(everything.expand(len(part), -1)) for part in parts]),
    )
    ids, logprobs, k = together.leading(64, 2)
    assert int(ids.max()) < VOCAB
    start = 0
    for part in parts:
        part_ids, part_logprobs, part_k = part.leading(64, 2)
        for row in range(len(part)):
            count = int(part_k[row])
            assert int(k[start + row]) == count
            assert torch.equal(ids[start + row, :count], part_ids[row, :count])
            assert torch.equal(logprobs[start + row, :count], part_logprobs[row, :count])
        start += len(part)


def test_leading_is_the_live_teachers_selection():
    logits = logits_of(20, 3)
    records = select_topk(logits, torch.zeros(20), top_k=VOCAB, window=64)
    cached = CachedTargets.from_sparse(records, vocab_size=VOCAB, window=64, min_k=2)
    (ids, logprobs, k), (live_ids, live_logprobs, live_k) = (
        cached.leading(64, 2),
        DenseTargets(logits).leading(64, 2),
    )
    assert torch.equal(k, live_k)
    valid = torch.arange(ids.shape[1]) < k[:, None]
    assert torch.equal(ids[valid], live_ids[valid])
    torch.testing.assert_close(logprobs[valid], live_logprobs[valid], atol=1e-5, rtol=0)


def test_cached_dbild_is_live_dbild_when_nothing_is_left_out(tmp_path):
    """One loss, one code path: with every logprob kept, value and gradient differ by quantisation only."""
    logits, student = logits_of(30, 5), logits_of(30, 6).requires_grad_()
    options = header(top_k=VOCAB, logprob_step=1e-3)
    with LogitCacheWriter(tmp_path / "c", **options) as writer:
        writer.add("a", select_topk(logits, torch.zeros(30), top_k=VOCAB, window=64, min_k=VOCAB), bytes(16))
    results = []
    for targets in (DenseTargets(logits), LogitCache(tmp_path / "c")["a"]):
        loss = dbild_loss(student, targets, window=64, reduction="none")
        results.append((loss, torch.autograd.grad(loss.sum(), student)[0]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=2e-3)


def test_other_kneedle_settings_and_ids_are_refused():
    targets = CachedTargets.from_sparse(sample(1)[1], vocab_size=VOCAB, window=64, min_k=2)
    fewest = int(targets.k.min())
    for window, min_k in ((96, 2), (fewest + 1, 2), (64, max(3, fewest + 1))):
        with pytest.raises(CachekdError, match="other Kneedle settings"):
            targets.leading(window, min_k)
    for bad in (VOCAB, -1):
        with pytest.raises(CachekdError, match="outside the teacher's vocabulary"):
            targets.gather(torch.full((len(targets), 1), bad))


# ---- writer, reader


def test_what_is_written_is_read(tmp_path):
    cache = LogitCache(write_cache(tmp_path / "c", 10, shard_tokens=5))
    assert len(cache.manifest.shards) > 2
    assert len(cache) == 10
    assert list(cache) == [sample(i)[0] for i in range(10)]
    for index in reversed(range(10)):
        key, records, content = sample(index)
        assert key in cache
        assert cache.sample_hash(key) == content
        targets = cache[key]
        assert targets.token_ids.tolist() == records.token_ids.tolist()
        kept = targets.ids[targets.logprobs.isfinite()]
        assert kept.tolist() == records.ids.tolist()
        assert (
            targets.logprobs[targets.logprobs.isfinite()] - torch.from_numpy(records.logprobs)
        ).abs().max() <= 1 / 16 + TAIL_STEP / 2
    assert verify_files(cache.path) == []
    counts = cache.histogram()
    assert sum(counts["k"].values()) == cache.manifest.tokens
    assert sum(k * count for k, count in counts["k"].items()) == cache.manifest.entries


def test_the_same_content_gives_the_same_bytes(tmp_path):
    files = []
    for name in ("a", "b"):
        path = write_cache(tmp_path / name, 6, shard_tokens=4)
        files.append(
            {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
        )
    assert files[0] == files[1]


def test_golden_files_are_read_and_written_as_ever(tmp_path):
    """tests/cache/golden is format version 1, for ever: today's reader reads it, today's writer writes it."""
    path = write_cache(tmp_path / "c")
    for name in ("manifest.json", "dump/plan.json", "dump/00000.json", "shards/00000.zarr.zip"):
        assert (path / name).read_bytes() == (GOLDEN / name).read_bytes(), name
    golden = LogitCache(GOLDEN)
    expected = json.loads((GOLDEN / "expected.json").read_text())
    for key, rows in expected.items():
        targets = golden[key]
        assert targets.token_ids.tolist() == [row["token_id"] for row in rows]
        for index, row in enumerate(rows):
            count = len(row["ids"])
            assert targets.ids[index, :count].tolist() == row["ids"]
            assert targets.logprobs[index, :count].tolist() == pytest.approx(row["logprobs"], abs=1e-5)
            assert int(targets.knee[index]) == row["knee"]
            assert float(targets.tail.logprob[index]) == pytest.approx(row["other"], abs=1e-5)


def test_any_zarr_reader_opens_a_shard(tmp_path):
    path = write_cache(tmp_path / "c") / "shards" / "00000.zarr.zip"
    with zarr.storage.ZipStore(path, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        assert group["token_ids"][:].tolist() == [
            t for i in range(4) for t in sample(i)[1].token_ids.tolist()
        ]
        assert bytes(group["sample_keys"][:]).decode().split("\n") == [sample(i)[0] for i in range(4)]
        assert int(group["k"][:].sum()) == len(group["topk_ranks"][:])


def test_reading_works_in_other_processes(tmp_path):
    cache = LogitCache(write_cache(tmp_path / "c", 6, shard_tokens=4))
    copy = pickle.loads(pickle.dumps(cache))
    keys = list(cache)
    assert torch.equal(copy[keys[3]].logprobs, cache[keys[3]].logprobs)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        shapes = pool.map(_shape, [(cache, key) for key in keys])
    assert shapes == [tuple(cache[key].ids.shape) for key in keys]


def _shape(job: tuple[LogitCache, str]) -> tuple[int, ...]:
    cache, key = job
    return tuple(cache[key].ids.numpy().shape)


def test_a_missing_key_is_named_with_its_neighbours(tmp_path):
    cache = LogitCache(write_cache(tmp_path / "c"))
    with pytest.raises(CachekdError, match="no sample 'sample/0000 é'") as caught:
        cache["sample/0000 é"]
    assert "sample/000 é" in str(caught.value)


# ---- what can go wrong


def test_nothing_is_overwritten(tmp_path):
    path = write_cache(tmp_path / "c")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(CachekdError, match="already holds something"):
        LogitCacheWriter(path, **header())
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("made", [True, False])
def test_a_failure_leaves_nothing(tmp_path, made):
    path = tmp_path / "c"
    if not made:
        path.mkdir()
    with pytest.raises(ZeroDivisionError), LogitCacheWriter(path, **header(), shard_tokens=1) as writer:  # noqa: PT012
        writer.add(*sample(0))
        raise ZeroDivisionError
    assert path.exists() != made
    assert not list(tmp_path.glob("c/*"))


def test_bad_samples_and_empty_caches_are_refused(tmp_path):
    with LogitCacheWriter(tmp_path / "a", **header()) as writer:
        writer.add(*sample(0))
        with pytest.raises(CachekdError, match="appears twice"):
            writer.add(*sample(0))
    shutil.rmtree(tmp_path / "a")
    with (
        pytest.raises(CachekdError, match="at least one sample"),
        LogitCacheWriter(tmp_path / "b", **header()),
    ):
        pass
    for changes in ({"key": "a\nb"}, {"content_hash": b"short"}):
        values = dict(zip(("key", "targets", "content_hash"), sample(0), strict=True)) | changes
        with LogitCacheWriter(tmp_path / "c", **header()) as writer:
            with pytest.raises(CachekdError, match="cannot be stored"):
                writer.add(**values)
            writer.add(*sample(0))
        shutil.rmtree(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_is_seen_or_harmless(tmp_path):
    """A changed byte either raises or leaves every value as it was; never another value in silence."""
    path = write_cache(tmp_path / "c", 6) / "shards" / "00000.zarr.zip"
    content, step = path.read_bytes(), 1 / 16
    truth = read_shard(path, step)
    seen = 0
    for position in range(0, len(content), max(1, len(content) // 250)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        try:
            shard = read_shard(path, step)
        except CachekdError:
            seen += 1
            continue
        assert shard.keys == truth.keys
        assert_equal_records(shard.targets, truth.targets)
    assert seen > 100


def test_lost_chunks_arrays_and_ends_are_seen(tmp_path):
    path = write_cache(tmp_path / "c") / "shards" / "00000.zarr.zip"
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for lost in members:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                if name != lost:
                    archive.writestr(name, data)
        with pytest.raises(CachekdError, match="damaged"):
            read_shard(path, 1 / 16)
    path.write_bytes(content[:-100])
    with pytest.raises(CachekdError, match="damaged"):
        read_shard(path, 1 / 16)


def test_damage_to_a_cache_is_named(tmp_path):
    path = write_cache(tmp_path / "c", 6, shard_tokens=4)
    shard = path / "shards" / "00001.zarr.zip"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CachekdError, match="was cut short"):
        LogitCache(path)
    shard.unlink()
    with pytest.raises(CachekdError, match="is missing"):
        LogitCache(path)
    other = (path / "shards" / "00000.zarr.zip").read_bytes()
    shard.write_bytes(content)
    cache = LogitCache(path)
    shard.write_bytes(other)
    findings = verify_files(path)
    assert [(finding.path, finding.shard) for finding in findings] == [(shard, 1)]
    assert "differs from what was written" in findings[0].problem
    with pytest.raises(CachekdError, match="the shard is damaged"):
        cache[sample(5)[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "newer cachekd"),
        (lambda text: text.replace('"codec"', '"kodec"'), "cannot be read"),
        (lambda text: "[]", "cannot be read"),
    ],
)
def test_a_bad_manifest_is_explained(tmp_path, change, message):
    path = write_cache(tmp_path / "c") / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(CachekdError, match=message) as caught:
        LogitCache(tmp_path / "c")
    assert str(path) in str(caught.value)


def test_a_folder_without_manifest_is_no_cache(tmp_path):
    (write_cache(tmp_path / "c") / "manifest.json").unlink()
    with pytest.raises(CachekdError, match="this dump did not finish"):
        LogitCache(tmp_path / "c")
    with pytest.raises(CachekdError, match="not a cache"):
        LogitCache(tmp_path / "nothing")


def test_schemas_are_in_step():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "schemas" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name in generate.SCHEMAS:
        assert (ROOT / "schemas" / f"{name}.schema.json").read_text() == generate.schema_text(name), (
            "make schemas"
        )
    assert Manifest.model_validate_json((GOLDEN / "manifest.json").read_text()).tokens == 7


def test_packing_is_exact_at_the_edges():
    """One token, one entry; every id of the vocabulary; logprobs far below what a step can hold."""
    for logits, top_k in ((torch.tensor([[0.0, -5000.0]]), 2), (logits_of(2, 1), VOCAB)):
        records = select_topk(logits, torch.zeros(len(logits)), top_k=top_k, top_p=0.9999999)
        shard = make_shard([("a", bytes(16), len(records))], records)
        packed = pack_shard(shard, 1 / 32)
        assert packed == pack_shard(shard, 1 / 32)


@pytest.mark.parametrize("what", ["answer token", "id", "id twice", "more than top_k", "nothing"])
def test_what_no_reader_would_take_is_not_written(tmp_path, what):
    key, targets, content = sample(2)
    ids, tokens, k = targets.ids.copy(), targets.token_ids.copy(), targets.k.copy()
    if what == "answer token":
        tokens[0] = VOCAB
    elif what == "id":
        ids[0] = VOCAB
    elif what == "id twice":
        ids[1] = ids[0]
    elif what == "more than top_k":
        k[0] = 33
    else:
        k[0] = 0
    with (
        pytest.raises(CachekdError, match=r"does not fit the cache|an id twice"),
        LogitCacheWriter(tmp_path / "c", **header()) as writer,
    ):
        writer.add(key, replace(targets, ids=ids, token_ids=tokens, k=k), content)
    assert not list(tmp_path.rglob("*.zip"))
