"""Stage one: the cache holds what the teacher says, in every sample, whatever the batching."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cachekd.cache import LogitCache
from cachekd.cache.codec import TAIL_STEP
from cachekd.config import DumpConfig
from cachekd.data import SampleEncoder, collate, open_samples, predicting_positions
from cachekd.dump import dump
from cachekd.errors import CachekdError
from cachekd.losses import dbild_loss
from cachekd.losses.targets import DenseTargets
from cachekd.models import load_model, load_processor, logits_at
from caches import files_of, write_cache
from tiny import save_vlm, tar_members, tiny_processor, write_tar


def live_logits(teacher_path: Path, data_path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each sample by itself, unpadded: logits over the tokenizer's tokens, and the answer tokens."""
    processor = load_processor(str(teacher_path))
    model = load_model(str(teacher_path), dtype=torch.float32, device=torch.device("cpu"))
    encoder, samples = SampleEncoder(processor), open_samples(data_path)
    live = {}
    for index in range(len(samples)):
        encoded = encoder(samples[index])
        batch = collate([encoded], 0)
        positions = predicting_positions(batch.pop("supervised"))
        with torch.no_grad():
            logits = logits_at(model, batch, positions)[:, : len(processor.tokenizer)]
        live[encoded.key] = (logits, encoded.token_ids)
    return live


def test_cached_targets_are_the_live_teachers(cache_path, teacher_path, data_path):
    cache = LogitCache(cache_path)
    live = live_logits(teacher_path, data_path)
    assert list(cache) == list(live)
    step = cache.manifest.codec.logprob_step
    for key, (logits, token_ids) in live.items():
        targets = cache[key]
        assert torch.equal(targets.token_ids, token_ids)
        ids, logprobs, k = targets.leading(cache.manifest.codec.window, cache.manifest.codec.min_k)
        dense = DenseTargets(logits, token_ids)
        valid = torch.arange(ids.shape[1]) < k[:, None]
        error = (dense.gather(ids) - logprobs).masked_fill(~valid, 0.0).abs()
        assert (error <= step + TAIL_STEP / 2 + 1e-5).all()


def test_the_manifest_says_where_the_logits_come_from(cache_path, teacher_path, data_path):
    manifest = LogitCache(cache_path).manifest
    assert manifest.teacher.name == str(teacher_path)
    assert manifest.teacher.model_type == "llava"
    assert manifest.teacher.vocab_size == len(load_processor(str(teacher_path)).tokenizer)
    assert len(manifest.teacher.weights_sha256) == 64
    assert manifest.sources[0].data.samples == manifest.samples == 12
    assert manifest.tokens == sum(
        len(targets.token_ids) for targets in map(LogitCache(cache_path).__getitem__, LogitCache(cache_path))
    )
    assert {"torch", "transformers", "tokenizers"} <= set(manifest.sources[0].versions)


def test_batch_size_changes_no_bit_that_matters(tmp_path, cache_path, teacher_path, data_path):
    config = DumpConfig(teacher=str(teacher_path), data=str(data_path), out=tmp_path / "one", batch_size=1)
    dump(config)
    one, four = LogitCache(tmp_path / "one"), LogitCache(cache_path)
    assert list(one) == list(four)
    ids = torch.arange(one.manifest.teacher.vocab_size)[None]
    for key in one:
        everything = ids.expand(len(one[key].token_ids), -1)
        a, b = one[key].gather(everything), four[key].gather(everything)
        # Padding changes the last bits of the logits, which can move a value by one quantisation step.
        assert (a - b).abs().max() <= 2 * one.manifest.codec.logprob_step


def test_top_k_of_the_whole_vocabulary_equals_live(tmp_path, teacher_path, data_path):
    vocab_size = len(load_processor(str(teacher_path)).tokenizer)
    dump(
        DumpConfig(
            teacher=str(teacher_path),
            data=str(data_path),
            out=tmp_path / "all",
            top_k=vocab_size,
            top_p=0.999999,
        )
    )
    cache = LogitCache(tmp_path / "all")
    generator = torch.Generator().manual_seed(0)
    for key, (logits, token_ids) in live_logits(teacher_path, data_path).items():
        student = logits + torch.randn(logits.shape, generator=generator)
        live = dbild_loss(student, DenseTargets(logits, token_ids))
        cached = dbild_loss(student, cache[key])
        torch.testing.assert_close(cached, live, rtol=0.02, atol=1e-3)


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_finished_cache_is_left_alone_by_the_same_command(cache_path, teacher_path, data_path):
    before = everything(cache_path)
    summary = dump(DumpConfig(teacher=str(teacher_path), data=str(data_path), out=cache_path, batch_size=4))
    assert summary.finished
    assert summary.new_tokens == 0
    assert everything(cache_path) == before


def test_a_folder_with_other_things_is_left_alone(tmp_path, teacher_path, data_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CachekdError, match="already holds something"):
        dump(DumpConfig(teacher=str(teacher_path), data=str(data_path), out=tmp_path))
    assert list(everything(tmp_path)) == ["notes.txt"]


def test_a_cache_whose_samples_came_one_by_one_is_not_dumped_into(tmp_path, teacher_path, data_path):
    """Finished or not: nobody knows how many were to come."""
    path = write_cache(tmp_path / "c")
    before = files_of(path)
    for _ in range(2):
        with pytest.raises(CachekdError, match="already holds something"):
            dump(DumpConfig(teacher=str(teacher_path), data=str(data_path), out=path))
        (path / "manifest.json").unlink(missing_ok=True)
    assert files_of(path) == {name: before[name] for name in before if name != "manifest.json"}


def test_a_bad_sample_stops_the_dump_and_what_is_finished_stays(tmp_path, teacher_path):
    members = tar_members(70)
    good = members[-2]
    members[-2] = (good[0], b"not a png")
    write_tar(tmp_path / "data" / "0.tar", members)
    config = DumpConfig(
        teacher=str(teacher_path),
        data=str(tmp_path / "data"),
        out=tmp_path / "out",
        batch_size=1,
        shard_samples=20,
        calibration_tokens=30,
    )
    with pytest.raises(CachekdError, match="cannot be read"):
        dump(config)
    assert len(list((tmp_path / "out" / "shards").glob("*.zip"))) == 3
    finished = everything(tmp_path / "out" / "shards")
    members[-2] = good
    write_tar(tmp_path / "data" / "0.tar", members)
    assert dump(config).samples == 70
    again = everything(tmp_path / "out" / "shards")
    assert {name: again[name] for name in finished} == finished


def test_progress_counts_every_sample_and_token(tmp_path, teacher_path, data_path):
    counted = []
    config = DumpConfig(teacher=str(teacher_path), data=str(data_path), out=tmp_path / "c", batch_size=5)

    def progress(phase, total, samples, tokens):
        if phase == "dump":
            assert total == 12
            counted.append((samples, tokens))

    summary = dump(config, progress)
    assert sum(samples for samples, _ in counted) == summary.samples == 12
    assert sum(tokens for _, tokens in counted) == summary.tokens
    assert summary.bytes == sum(path.stat().st_size for path in (tmp_path / "c" / "shards").glob("*.zip"))


@pytest.mark.parametrize(("tail", "tolerance"), [("none", 1e-4), ("exact", 0.02)])
def test_a_vocabulary_padded_beyond_the_tokenizer_is_cut(tmp_path, data_path, tail, tolerance):
    path = save_vlm(tmp_path / "padded", tiny_processor(), vocab_size=400, seed=1)
    dump(DumpConfig(teacher=str(path), data=str(data_path), out=tmp_path / "c", tail=tail))
    cache = LogitCache(tmp_path / "c")
    size = len(load_processor(str(path)).tokenizer)
    assert cache.manifest.teacher.vocab_size == size < 400
    targets = cache[next(iter(cache))]
    mass = targets.everywhere().exp().sum(-1)
    assert targets.everywhere().shape == (len(targets), size)
    torch.testing.assert_close(mass, torch.ones(len(targets)), atol=tolerance, rtol=0)
