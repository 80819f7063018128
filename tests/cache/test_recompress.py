"""A smaller cache without a teacher: what a direct dump would have stored, and how far off the rest is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cachekd.cache import (
    LogitCache,
    LogitCacheWriter,
    Manifest,
    OutputHead,
    TailSetting,
    TailStates,
    roundtrip,
    select_topk,
    verify_files,
)
from cachekd.cache.codec import TAIL_STEP, decode_tail
from cachekd.cache.container import read_arrays
from cachekd.cache.derive import merge_caches
from cachekd.cache.recompress import cut_entries, recompress
from cachekd.cache.shard import decode_targets, make_shard, pack_shard, read_codes
from cachekd.cache.tail.coarsen import coarsen
from cachekd.cache.tail.encoder import read_encoder
from cachekd.cache.tail.fit import fit_sketch
from cachekd.errors import CachekdError
from cachekd.hub import pull_cache
from cachekd_cli.main import app
from caches import (
    GOLDEN,
    dump_cache,
    files_of,
    flip,
    header,
    logits_of,
    model_states,
    reseal,
    select_samples,
    stored,
    token_ids,
    true_logprobs,
    write_cache,
    write_data,
)

STEP = 1 / 16
ODDS_BOUND = STEP + 1.5 * TAIL_STEP  # nats, as the module says


def codes_of(folder: Path, logits: torch.Tensor, top_k: int) -> tuple[dict[str, np.ndarray], bytes]:
    """What a dump with `top_k` stores of some tokens."""
    records = select_topk(logits, torch.zeros(len(logits)), top_k=top_k, window=64, top_p=0.999)
    content = pack_shard(make_shard([("a", bytes(16), len(records))], records), STEP)
    path = folder / f"{top_k}.zarr.zip"
    path.write_bytes(content)
    return read_codes(path, sketch=False), content


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("codes")


@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20")), deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 0.3, 2.0, 4.0, 12.0, 40.0]),
    low=st.integers(2, 40),
    high=st.integers(2, 64),  # in the window: beyond it, equal logits may come in another order
)
def test_cut_codes_are_those_of_a_direct_dump(folder, seed, scale, low, high):
    """All of them, but the odds of tokens that lost entries: those within the stated bound."""
    low, high = min(low, high), max(low, high)
    logits = logits_of(6, seed, scale=scale)
    large, direct = codes_of(folder, logits, high)[0], codes_of(folder, logits, low)[0]
    cut = cut_entries(large, low, STEP)
    assert set(cut) == set(direct)
    for name in set(direct) - {"tail"}:
        assert np.array_equal(cut[name], direct[name]), name
        assert cut[name].dtype == direct[name].dtype, name
    whole = large["k"] <= low
    assert np.array_equal(cut["tail"][whole], direct["tail"][whole])
    off = np.abs(cut["tail"].astype(int) - direct["tail"].astype(int))[~whole]
    assert (off * TAIL_STEP <= ODDS_BOUND + 1e-9).all()
    a, b = decode_targets(cut, STEP), decode_targets(direct, STEP)
    for token in range(6):  # what DBiLD compares are differences: the same
        one, other = a.cut(token, token + 1).logprobs, b.cut(token, token + 1).logprobs
        np.testing.assert_allclose(one - one[0], other - other[0], atol=2e-5)
    mass = np.exp(a.tail_logmass.astype(float)) + np.add.reduceat(
        np.exp(a.logprobs.astype(float)), np.cumsum(np.append(0, a.k[:-1].astype(int)))
    )
    np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_where_nothing_is_cut_the_bytes_are_those_of_a_direct_dump(folder):
    logits = logits_of(20, 3, scale=40.0)  # sure of itself: few entries
    large, content = codes_of(folder, logits, 60)
    assert 2 < large["k"].max() <= 45
    cut = cut_entries(large, 45, STEP)
    assert all(np.array_equal(cut[name], large[name]) for name in large)
    assert codes_of(folder, logits, 45)[1] == content


@pytest.fixture(scope="module")
def dumps(tmp_path_factory, teacher_path) -> dict[str, Path]:
    """The same data at 64 and at 16 logprobs a token, with a sketch and without one."""
    out = tmp_path_factory.mktemp("dumps")
    data = write_data(out / "data", 14)
    return {
        f"{tail}-{top_k}": dump_cache(
            out / f"{tail}-{top_k}", teacher_path, data, top_k=top_k, tail=tail, top_p=0.9
        )
        for tail in ("none", "step=0.05")
        for top_k in (64, 16)
    }


@pytest.mark.parametrize("tail", ["none", "step=0.05"])
def test_64_cut_to_16_equals_a_dump_at_16(dumps, tmp_path, tail):
    large, direct = dumps[f"{tail}-64"], dumps[f"{tail}-16"]
    before = files_of(large)
    manifest = recompress(large, tmp_path / "c", top_k=16)
    assert files_of(large) == before
    assert verify_files(tmp_path / "c") == []
    assert manifest.codec == Manifest.load(direct).codec
    assert Manifest.load(large).entries > manifest.entries == Manifest.load(direct).entries
    cut, expected = stored(tmp_path / "c"), stored(direct)
    assert list(cut) == list(expected)
    shifts = set()
    for key, parts in expected.items():
        for name in set(parts) - {"tail", "shift"}:
            assert np.array_equal(cut[key][name], parts[name]), (key, name)
        assert np.abs(cut[key]["tail"].astype(int) - parts["tail"].astype(int)).max() <= 3
        if "shift" in parts:
            shifts |= set((cut[key]["shift"].astype(int) - parts["shift"].astype(int)).tolist())
    if shifts:  # a dump at 16 corrects the mass of other tails, by one number for all tokens
        assert max(shifts) - min(shifts) <= 1
        assert manifest.sketches == Manifest.load(large).sketches
        assert (tmp_path / "c" / "sketch.zarr.zip").samefile(large / "sketch.zarr.zip")
    a, b = LogitCache(tmp_path / "c"), LogitCache(direct)
    for key in a:
        difference = (a[key].everywhere() - b[key].everywhere()).abs().max()
        assert difference <= ODDS_BOUND + STEP


def test_a_recompressed_cache_can_be_read_selected_and_merged(dumps, tmp_path):
    recompress(dumps["none-64"], tmp_path / "c", top_k=16)
    keys = list(LogitCache(tmp_path / "c"))
    select_samples(tmp_path / "c", tmp_path / "a", set(keys[:7]))
    select_samples(dumps["none-16"], tmp_path / "b", set(keys[7:]))
    merged = merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "m")  # the same settings
    assert list(LogitCache(tmp_path / "m")) == keys
    assert [step.operation for step in merged.lineage] == ["recompress", "select", "select", "merge"]
    first, second, third, last = merged.lineage
    assert first.parents == [Manifest.load(dumps["none-64"]).sha256]
    assert first.parent_codec.top_k == 64
    assert first.result == Manifest.load(tmp_path / "c").sha256 == second.parents[0]
    assert second.result == Manifest.load(tmp_path / "a").sha256
    assert third.result == Manifest.load(tmp_path / "b").sha256
    assert last.parents == [second.result, third.result]
    assert (last.result, last.fidelity, last.parent_samples) == (None, None, 14)


def test_a_dumps_own_manifest_has_no_lineage_and_an_unknown_field_is_refused(tmp_path, dumps):
    assert "lineage" not in json.loads((dumps["none-64"] / "manifest.json").read_bytes())
    assert Manifest.load(GOLDEN).lineage == []
    path = shutil.copytree(GOLDEN, tmp_path / "c") / "manifest.json"
    reseal(path, lambda values: values.update(later="x"))
    with pytest.raises(CachekdError, match="a field that this version does not know") as caught:
        LogitCache(tmp_path / "c")
    assert "upgrade cachekd" in str(caught.value)


# ---- the tail


def fitted(step: float):
    hidden, head = model_states(900, 24, 300)
    logits = hidden @ head.T
    records = select_topk(logits, token_ids(900), top_p=0.0)
    states = TailStates(hidden, logits.logsumexp(-1))
    encoder = fit_sketch(OutputHead(head), states, records, TailSetting.parse(f"step={step}"))
    codes = encoder.encode(states)
    return hidden, head, states, encoder, records.__class__(**{**records.__dict__, "sketch": codes})


def test_an_odd_multiple_of_the_step_gives_the_codes_of_the_states_themselves():
    """No double rounding: every new cell is a union of old ones."""
    _, _, states, encoder, records = fitted(0.1)
    how = coarsen(encoder, records, TailSetting.parse("step=0.5"), "here")
    assert how.factor == pytest.approx(5)
    direct, coarse = how.encoder.encode(states), how(records.sketch)
    assert coarse.coordinates.shape == direct.coordinates.shape
    assert coarse.coordinates.shape[1] <= encoder.sketch.axes
    differ = coarse.coordinates != direct.coordinates
    assert differ.mean() < 1e-3  # on the border of a cell, a float's last bit decides
    assert np.abs(coarse.shift.astype(int) - direct.shift).max() <= 1


@pytest.mark.parametrize("tail", ["step=0.37", "bytes=8"])
def test_a_coarser_sketch_is_nearly_as_good_as_one_that_was_fitted(tmp_path, tail):
    """Against the teacher itself, which recompressing does not ask."""
    hidden, head, states, encoder, _ = fitted(0.1)
    truth = true_logprobs(hidden, head)
    records = select_topk(hidden @ head.T, token_ids(900), top_k=8, top_p=0.0)
    setting = header(top_k=8, top_p=0.0, tail="step=0.1")
    setting["teacher"] = setting["teacher"].model_copy(update={"vocab_size": 300})
    with LogitCacheWriter(tmp_path / "c", **setting, encoder=encoder) as writer:
        writer.add("states", records, bytes(16), states)
    new = recompress(tmp_path / "c", tmp_path / "new", tail=tail)
    direct, direct_size = roundtrip(hidden, head, token_ids(900), top_k=8, window=64, tail=tail)

    def kl(targets):
        rebuilt = targets.everywhere().log_softmax(-1)
        return float((truth.exp() * (truth - rebuilt)).sum(-1).mean())

    old = kl(LogitCache(tmp_path / "c")["states"])
    found, best = kl(LogitCache(tmp_path / "new")["states"]), kl(direct)
    assert old < best  # there was something to lose
    assert found <= 1.15 * best + old
    assert new.size <= 1.05 * direct_size
    assert new.size < Manifest.load(tmp_path / "c").size
    assert new.sketch_bytes < Manifest.load(tmp_path / "c").sketch_bytes
    # The tails' mass is right on average, as the dump had it.
    tail_mass = decode_tail(read_arrays(tmp_path / "new/shards/00000.zarr.zip", ["tail"], {})["tail"])[0]
    targets = LogitCache(tmp_path / "new")["states"]
    rebuilt = targets.tail.everywhere(300).scatter(-1, targets.ids.clamp(max=299), -torch.inf).logsumexp(-1)
    assert abs(float((rebuilt - torch.from_numpy(tail_mass)).mean())) < 0.03
    # What the manifest says of it is measured.
    fidelity = new.lineage[-1].fidelity
    assert 0 < fidelity.kl < 2 * found
    assert fidelity.tokens == 256
    assert new.fidelity is None
    assert read_encoder(tmp_path / "new" / "sketch.zarr.zip").step == new.sketches[0].step


def test_an_exact_sketch_becomes_an_ordinary_one(tmp_path):
    """Its last axis, which holds what the shift's rounding leaves, goes."""
    hidden, head = model_states(400, 24, 300)
    records = select_topk(hidden @ head.T, token_ids(400), top_k=8, top_p=0.0)
    states = TailStates(hidden, (hidden @ head.T).logsumexp(-1))
    encoder = fit_sketch(OutputHead(head), states, records, TailSetting.parse("exact"))
    assert encoder.has_shift_axis
    setting = header(top_k=8, top_p=0.0, tail="exact")
    setting["teacher"] = setting["teacher"].model_copy(update={"vocab_size": 300})
    with LogitCacheWriter(tmp_path / "c", **setting, encoder=encoder) as writer:
        writer.add("states", records, bytes(16), states)
    recompress(tmp_path / "c", tmp_path / "new", tail="step=0.1")
    again = read_encoder(tmp_path / "new" / "sketch.zarr.zip")
    assert not again.has_shift_axis
    assert again.sketch.axes == len(again.analysis) < encoder.sketch.axes
    error = LogitCache(tmp_path / "new")["states"].everywhere() - true_logprobs(hidden, head)
    assert error.abs().mean() < 0.3


def test_a_merged_caches_sketches_become_coarser_each(dumps, tmp_path, teacher_path):
    other = dump_cache(
        tmp_path / "other",
        teacher_path,
        write_data(tmp_path / "d", 8, start=50),
        top_k=64,
        tail="step=0.05",
        top_p=0.9,
    )
    merge_caches([dumps["step=0.05-64"], other], tmp_path / "m")
    new = recompress(tmp_path / "m", tmp_path / "c", tail="step=0.2", top_k=32)
    assert [sketch.step for sketch in new.sketches] == pytest.approx([0.2, 0.2])
    assert len({sketch.sha256 for sketch in new.sketches}) == 2
    assert verify_files(tmp_path / "c") == []
    old, cache = LogitCache(tmp_path / "m"), LogitCache(tmp_path / "c")
    for key in old:
        assert torch.equal(cache[key].token_ids, old[key].token_ids)
        assert (cache[key].everywhere() - old[key].everywhere()).abs().mean() < 0.2
    pull_cache(f"file://{tmp_path}/m", tmp_path / "part", shards="0")  # lists both sketches, and uses one
    part = recompress(tmp_path / "part", tmp_path / "p", tail="step=0.2", top_k=32)
    assert len(part.sketches) == 1


def test_without_a_tail_what_is_not_kept_is_even(dumps, tmp_path):
    new = recompress(dumps["step=0.05-64"], tmp_path / "c", tail="none", top_k=16)
    assert new.sketches == []
    assert sorted(files_of(tmp_path / "c")) == sorted(
        ["manifest.json", "vocabulary.zarr.zip", *(f"shards/{info.name}" for info in new.shards)]
    )
    cut, expected = stored(tmp_path / "c"), stored(dumps["none-16"])
    for key, parts in expected.items():
        for name in set(parts) - {"tail"}:
            assert np.array_equal(cut[key][name], parts[name])


# ---- what is refused


@pytest.mark.parametrize(
    ("cache", "options", "message"),
    [
        ("none-16", {"top_k": 64}, "holds fewer logprobs"),
        ("none-16", {"top_k": 1}, "too small"),
        ("none-16", {"top_k": 16}, "has these settings already"),
        ("none-16", {}, "has these settings already"),
        ("none-16", {"tail": "bytes=8"}, "has no tail sketch"),
        ("step=0.05-16", {"tail": "step=0.01"}, "cannot become finer"),
        ("step=0.05-16", {"tail": "exact"}, "cannot become finer"),
        ("step=0.05-16", {"tail": "bytes=5000"}, "cannot become finer"),
        ("step=0.05-16", {"tail": "half"}, "unknown tail"),
    ],
)
def test_what_cannot_be_had_is_refused(dumps, tmp_path, cache, options, message):
    with pytest.raises(CachekdError, match=message):
        recompress(dumps[cache], tmp_path / "c", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing_and_nothing_is_overwritten(dumps, tmp_path):
    damaged = shutil.copytree(dumps["none-64"], tmp_path / "damaged")
    flip(damaged / "shards" / "00001.zarr.zip", 900)
    with pytest.raises(CachekdError, match="damaged"):
        recompress(damaged, tmp_path / "c", top_k=16)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
    with pytest.raises(CachekdError, match="already holds something"):
        recompress(dumps["none-64"], damaged, top_k=16)


def test_the_command(tmp_path):
    path = write_cache(tmp_path / "c", 6, shard_tokens=4)
    result = CliRunner().invoke(app, ["recompress", str(path), str(tmp_path / "d"), "--top-k", "4", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["bytes"] == Manifest.load(tmp_path / "d").size < Manifest.load(path).size
    assert found["fidelity_to_parent"]["kl"] > 0
    result = CliRunner().invoke(app, ["recompress", str(path), str(tmp_path / "e"), "--top-k", "4"])
    assert "gradient cosine" in result.stdout
    assert files_of(tmp_path / "e") == files_of(tmp_path / "d")
