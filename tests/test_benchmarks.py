"""The benchmarks run, on states small enough for a test, and say what the docs say they say."""

from __future__ import annotations

import json

import pytest
import torch
from caches import ROOT, model_states
from launch import output_of

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def rates(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rate_distortion

    return rate_distortion


def small_states(rates):
    tokens = 2 * (rates.BLOCK - rates.CONTEXT)
    hidden, head = model_states(tokens + 900, 24, 300)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(tokens, 24, generator=generator) * hidden.std(0)
    students = {"far": hidden[:tokens] + noise, "near": hidden[:tokens] + noise / 3}
    return rates.States(hidden[tokens:], hidden[:tokens], students, torch.arange(tokens) % 300, head)


def test_rate_distortion_rows(rates, tmp_path):
    states = small_states(rates)
    ids = rates.other_ids(states)
    rows = [rates.naive(states, ids, 32, zstd=zstd, folder=tmp_path) for zstd in (False, True)]
    for number, (tail, top_k) in enumerate((("none", 32), ("bytes=6", 128), ("exact", 128))):
        (tmp_path / str(number)).mkdir()
        rows.append(rates.ours(states, ids, tail, top_k, tmp_path / str(number)))
    rates.score(rows, states)
    raw, packed, uniform, sketch, exact = (row for row, _ in rows)
    assert raw.bytes_per_token == 6 * 32
    assert packed.bytes_per_token < raw.bytes_per_token
    assert packed.kl == raw.kl
    assert uniform.kl == pytest.approx(raw.kl, rel=0.2)  # the same ids, other rounding
    assert exact.kl < sketch.kl < uniform.kl
    assert exact.cosine_near > sketch.cosine_near > uniform.cosine_near
    assert exact.cosine_far > 0.99
    for row, targets in rows:
        assert row.encode_tokens_per_s > 0
        assert row.decode_tokens_per_s > 0
        assert len(targets) == len(states.teacher)
    rates.plot([row for row, _ in rows], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


@pytest.mark.slow
def test_dbild_benchmark_prints_its_rows():
    rows = json.loads(output_of(BENCHMARKS / "dbild.py", "--tokens", "20", "--json"))
    assert [row["k"] for row in rows] == [8, 16, 32, 64, 128, 256]
    assert set(rows[0]) >= {"pairwise_ms", "ours_ms", "pairwise_mb", "ours_mb"}
    assert rows[-1]["ours_mb"] < rows[-1]["pairwise_mb"] / 10


@pytest.mark.slow
def test_step_time_prints_its_rows():
    """All five do what they say: FLOPs are counted, not timed, so they can be compared."""
    printed = output_of(BENCHMARKS / "step_time.py", "--size", "tiny", "--steps", "1", "--json")
    rows = {row["name"]: row for row in json.loads(printed)}
    assert list(rows) == ["naive_live", "live", "cached", "cached_no_vsd", "ce_only"]
    assert all(row[name] > 0 for row in rows.values() for name in ("step_ms", "peak_mb", "flops"))
    flops = [row["flops"] for row in rows.values()]
    assert flops == sorted(flops, reverse=True)
    assert rows["live"]["loss"] == pytest.approx(rows["naive_live"]["loss"], rel=1e-3)
    assert rows["cached"]["loss"] == pytest.approx(rows["live"]["loss"], rel=0.2)


def test_methods_of_the_seeds_benchmark_are_settings(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from demo_seeds import EXAMPLE, METHODS

    from cachekd.config import TrainConfig, read_config

    common = {"student": "s", "teacher": "t", "data": "d", "cache": "c", "out": "o"}
    for name, changed in METHODS.items():
        config = read_config(EXAMPLE / "recipe.yaml", TrainConfig, {**common, **changed})
        assert config.vsd_every == (int(name[-1]) if name.startswith("vsd_every") else 1)


@pytest.mark.slow
def test_the_memory_benchmark_needs_less_and_says_the_same_loss():
    printed = output_of(BENCHMARKS / "train_memory.py", "--vocab", "20000", "--json")
    naive, live, cached, recomputed = json.loads(printed)
    assert live["loss"] == pytest.approx(naive["loss"], rel=1e-4)
    assert cached["loss"] == pytest.approx(recomputed["loss"], rel=1e-4)
    assert cached["peak_mb"] < naive["peak_mb"]


@pytest.mark.slow
def test_a_mix_as_people_have_it_runs_from_check_to_eval_and_is_counted_rightly():
    """Ids that come again, broken pictures, too long samples, turns that are not supervised, text alone."""
    sizes = ["--records", "400", "--test", "60", "--epochs", "0.2"]
    found = json.loads(output_of(BENCHMARKS / "real_mix.py", *sizes, "--json"))
    assert found["wrong"] == {}
    assert found["counts"]["dump: skipped"] == 15
    assert [run["command"] for run in found["runs"]] == ["check", "dump", "train", "eval"]


@pytest.mark.slow
def test_the_benchmark_of_many_shards_measures_all_commands():
    sizes = ["--reading", "6000x40", "--commands", "60x3"]
    reading, *commands = json.loads(output_of(BENCHMARKS / "many_shards.py", *sizes, "--json"))
    assert reading["samples"] == 6000
    assert reading["reads_s"] > 0
    assert {row["command"] for row in commands} >= {"peek", "select --filter", "recompress", "export"}
    assert all(row["peak_mb"] > 100 for row in commands)
