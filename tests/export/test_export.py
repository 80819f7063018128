"""Other ways out: tars, tables and a torch Dataset hold what the cache holds."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from cachekd import CachedLogits
from cachekd.cache import LogitCache, LogitCacheWriter, Manifest
from cachekd.cache.recompress import recompress
from cachekd.data import open_samples
from cachekd.errors import CachekdError
from cachekd.export import export_parquet, export_webdataset
from cachekd.export.sparse import SparseTargets
from cachekd.export.webdataset import member_name
from cachekd_cli.main import app
from caches import VOCAB, copied, dump_cache, files_of, flip, header, sample, write_cache
from tiny import conversation, noise_image, png_bytes, tar_members, write_tar


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """14 samples of one image, and one of two."""
    folder = tmp_path_factory.mktemp("data")
    members = tar_members(14)
    two = [{"from": "human", "value": "<image>which <image>?"}, {"from": "gpt", "value": "the red"}]
    members += [(f"both.{number}.png", png_bytes(noise_image(90 + number))) for number in (0, 1)]
    members += [("both.json", json.dumps({"conversations": two}).encode())]
    write_tar(folder / "0.tar", members)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher_path, data) -> Path:
    return dump_cache(tmp_path_factory.mktemp("exported") / "c", teacher_path, data, top_k=40)


def assert_holds(found: dict, cache: LogitCache, key: str, top_k: int | None = None) -> None:
    """Ids, logprobs and tail of a sample, token by token, against the cache's own look-up."""
    targets, records = cache[key], cache.sparse(key)
    assert list(found["token_ids"]) == targets.token_ids.tolist()
    for token in range(len(targets)):
        k = int(targets.k[token]) if top_k is None else min(top_k, int(targets.k[token]))
        ids = torch.tensor(np.array(found["topk_ids"][token])[:k])
        assert ids.tolist() == targets.ids[token, :k].tolist()
        logprobs = np.array(found["topk_logprobs"][token])[:k]
        assert logprobs.tolist() == targets.logprobs[token, :k].tolist()
        mass = np.exp(logprobs.astype(float)).sum() + np.exp(found["tail_logmass"][token])
        assert mass == pytest.approx(1, abs=1e-5)
    if top_k is None:
        assert np.array(found["tail_logmass"], np.float32).tolist() == records.tail_logmass.tolist()


# ---- WebDataset


def test_tars_hold_samples_and_targets(cache, data, tmp_path):
    before = files_of(cache)
    assert export_webdataset(cache, tmp_path / "out", open_samples(data)) == 15
    assert files_of(cache) == before
    opened = LogitCache(cache)
    assert len(list((tmp_path / "out").glob("*.tar"))) == len(opened.manifest.shards) > 1
    # Read by our own reader: the same samples, so the cache matches them.
    again = open_samples(tmp_path / "out")
    assert sorted(again.keys) == sorted(opened)
    for place, key in enumerate(again.keys):
        assert again[place].content_hash == opened.sample_hash(key)
    # And by webdataset's own decoders.
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    found = {
        item["__key__"]: item
        for item in webdataset.WebDataset(urls, shardshuffle=False).decode("pil", "rgb8")
    }
    assert set(found) == set(opened)
    for key, item in found.items():
        with np.load(io.BytesIO(raw_member(urls, f"{key}.targets.npz")), allow_pickle=False) as arrays:
            assert_holds(dict(arrays), opened, key)
            assert set(arrays.files) == {"token_ids", "k", "topk_ids", "topk_logprobs", "tail_logmass"}
        assert np.array_equal(item["targets.npz"]["k"], opened[key].k)
        assert item["json"]["id"] == key
    facts = json.loads((tmp_path / "out" / "cachekd_export.json").read_text())
    assert facts["manifest_sha256"] == opened.manifest.sha256
    assert facts["teacher"]["vocab_size"] == opened.manifest.teacher.vocab_size


def raw_member(urls: list[str], name: str) -> bytes:
    for url in urls:
        with tarfile.open(url) as tar:
            if name in tar.getnames():
                return tar.extractfile(name).read()
    raise KeyError(name)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("s001", "s001"),
        ("coco/train.2017/17", "coco/train%2E2017/17"),
        ("../../etc/passwd", "%2E%2E/%2E%2E/etc/passwd"),
        ("/etc/passwd", "%2Fetc%2Fpasswd"),
        ("a%2Eb", "a%252Eb"),
        ("a//b/", "a%2F%2Fb%2F"),
        ("", "%"),
        ("é \0", "%C3%A9 %00"),
    ],
)
def test_any_key_becomes_a_name_that_stays_in_its_folder(key, name):
    from webdataset.tariterators import base_plus_ext

    assert member_name(key) == name
    assert base_plus_ext(f"{name}.targets.npz") == (name, "targets.npz")


def test_data_that_are_not_those_of_the_dump_are_refused(cache, data, tmp_path):
    with pytest.raises(CachekdError, match="lack samples of the cache") as caught:
        export_webdataset(cache, tmp_path / "out", open_samples(data, limit=9))
    assert "6 are missing, the first is 's009'" in str(caught.value)
    other = tar_members(14)
    other[10] = (other[10][0], png_bytes(noise_image(77)))
    members = [*other, ("both.png", png_bytes(noise_image(1)))]
    members.append(("both.json", json.dumps({"conversations": conversation(0)}).encode()))
    write_tar(tmp_path / "other" / "0.tar", members)
    with pytest.raises(CachekdError, match="differs from the one that the teacher saw") as caught:
        export_webdataset(cache, tmp_path / "out", open_samples(tmp_path / "other"))
    assert "s005" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]  # nothing half-written


# ---- parquet


@pytest.mark.parametrize("top_k", [None, 5])
def test_the_table_is_read_by_datasets(cache, tmp_path, top_k):
    rows = export_parquet(cache, tmp_path / "out", top_k=top_k)
    table = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "hf"))
    opened = LogitCache(cache)
    assert rows == len(table) == len(opened)
    assert table["key"] == list(opened)
    for row in table:
        assert_holds(row, opened, row["key"], top_k)
        assert row["content_hash"] == opened.sample_hash(row["key"]).hex()
        if top_k is not None:
            assert max(map(len, row["topk_ids"])) <= top_k
    facts = pq.read_schema(next((tmp_path / "out" / "data").glob("*.parquet"))).metadata[b"cachekd"]
    assert json.loads(facts)["manifest_sha256"] == opened.manifest.sha256


def test_a_cut_export_is_that_of_a_cut_cache(cache, tmp_path):
    recompress(cache, tmp_path / "small", top_k=5)
    export_parquet(cache, tmp_path / "a", top_k=5)
    export_parquet(tmp_path / "small", tmp_path / "b")
    one, other = (
        datasets.Dataset.from_parquet(
            sorted(map(str, (tmp_path / name).rglob("*.parquet"))), cache_dir=str(tmp_path / "hf")
        )
        for name in "ab"
    )
    assert one["topk_ids"] == other["topk_ids"]
    for a, b in zip(one["topk_logprobs"], other["topk_logprobs"], strict=True):
        for x, y in zip(a, b, strict=True):  # the mass that is left is rounded once more
            np.testing.assert_allclose(x, y, atol=1 / 64 + 1e-6)


def test_an_interrupted_export_leaves_nothing(cache, tmp_path):
    damaged = copied(cache, tmp_path / "damaged")
    flip(damaged / "shards" / "00001.zarr.zip", 900)
    with pytest.raises(CachekdError, match="damaged"):
        export_parquet(damaged, tmp_path / "out")

    def stop(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_parquet(cache, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
    with pytest.raises(CachekdError, match="already holds something"):
        export_parquet(cache, damaged)


@pytest.mark.parametrize("top_k", [0, 41])
def test_what_is_not_kept_cannot_be_exported(cache, tmp_path, top_k):
    with pytest.raises(CachekdError, match="cannot give that many"):
        export_parquet(cache, tmp_path / "out", top_k=top_k)
    with pytest.raises(CachekdError, match="cannot give that many"):
        CachedLogits(cache, top_k=top_k)


# ---- torch


def test_items_hold_what_the_cache_holds(cache):
    opened = LogitCache(cache)
    for top_k in (None, 7):
        found = CachedLogits(opened, top_k=top_k)
        assert len(found) == len(opened)
        for index, key in enumerate(opened):
            item = found[index]
            assert item["key"] == key
            assert item["topk_ids"].dtype == item["token_ids"].dtype == item["k"].dtype == torch.int64
            arrays = {name: value.numpy() for name, value in item.items() if name != "key"}
            assert_holds(arrays, opened, key, top_k)
            padding = torch.arange(item["topk_ids"].shape[1]) >= item["k"][:, None]
            assert item["topk_logprobs"][padding].isneginf().all()
            assert (item["topk_ids"][padding] == 0).all()
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_batches_come_from_workers(tmp_path, context):
    path = write_cache(tmp_path / "c", 10, shard_tokens=4)
    found = CachedLogits(path, top_k=12)
    loader = DataLoader(
        found, batch_size=4, num_workers=1, collate_fn=found.collate, multiprocessing_context=context
    )
    batches = list(loader)
    assert [key for batch in batches for key in batch["keys"]] == found.keys
    for batch in batches:
        assert batch["topk_ids"].shape == batch["topk_logprobs"].shape
        assert batch["answer_mask"].shape == batch["token_ids"].shape == batch["topk_ids"].shape[:2]
        for row, key in enumerate(batch["keys"]):
            item, mask = found[found.keys.index(key)], batch["answer_mask"][row]
            assert int(mask.sum()) == len(item["token_ids"])
            for name in ("token_ids", "k", "tail_logmass"):
                assert torch.equal(batch[name][row][mask], item[name])
                assert (batch[name][row][~mask] == 0).all()
            width = item["topk_ids"].shape[1]
            assert torch.equal(batch["topk_ids"][row][mask][:, :width], item["topk_ids"])
            assert batch["topk_logprobs"][row][~mask].isneginf().all()


def test_a_top_k_loss_from_a_batch_is_that_of_the_cache(tmp_path):
    """The docstring's example, worked out."""
    path = write_cache(tmp_path / "c", 5)
    found, opened = CachedLogits(path), LogitCache(path)
    batch = found.collate([found[index] for index in range(5)])
    logits = torch.randn(*batch["token_ids"].shape, VOCAB, generator=torch.Generator().manual_seed(0))
    student = logits.log_softmax(-1).gather(-1, batch["topk_ids"])
    teacher = batch["topk_logprobs"]
    kl = (teacher.exp() * (teacher - student)).nan_to_num(0.0).sum(-1)
    for row, key in enumerate(batch["keys"]):
        targets = opened[key]
        ours = logits[row, : len(targets)].log_softmax(-1)
        for token in range(len(targets)):
            ids = targets.ids[token, : int(targets.k[token])]
            logprobs = targets.gather(ids.expand(len(targets), -1))[token]
            expected = (logprobs.exp() * (logprobs - ours[token][ids])).sum()
            torch.testing.assert_close(kl[row, token], expected, atol=1e-5, rtol=1e-4)


def test_padding_takes_a_token_without_entries_after_the_cut(tmp_path):
    with LogitCacheWriter(tmp_path / "c", **header()) as writer:
        writer.add(*sample(0))
    records = LogitCache(tmp_path / "c").sparse(sample(0)[0])
    sparse = SparseTargets.from_sparse(records, 1)
    assert sparse.topk_ids.shape == (len(records), 1)
    mass = np.exp(sparse.topk_logprobs.astype(float)).sum(1) + np.exp(sparse.tail_logmass.astype(float))
    np.testing.assert_allclose(mass, 1, atol=1e-5)


# ---- the command


def test_the_command(cache, data, tmp_path):
    run = CliRunner().invoke
    result = run(app, ["export", str(cache), str(tmp_path / "p"), "--to", "parquet", "--json"])
    assert json.loads(result.stdout)["samples"] == 15
    arguments = ["--to", "webdataset", "--data", str(data), "--top-k", "3"]
    result = run(app, ["export", str(cache), str(tmp_path / "w"), *arguments])
    assert "15 samples" in result.stdout
    assert (
        Manifest.load(cache).tokens == json.loads((tmp_path / "w/cachekd_export.json").read_text())["tokens"]
    )
    for wrong in (["--to", "webdataset"], ["--to", "parquet", "--data", str(data)]):
        caught = run(app, ["export", str(cache), str(tmp_path / "x"), *wrong]).exception
        assert isinstance(caught, CachekdError)
