"""The benchmarks run, on states small enough for a test, and say what the docs say they say."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import SmolVLMImageProcessorPil

from cachekd.vocabulary import TokenBytes
from caches import ROOT, model_states
from launch import output_of
from tiny import noise_image, tiny_processor
from tiny_texts import save_lm

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
    rows.append(rates.raw(states, ids, tmp_path))
    rates.score(rows, states)
    naive, packed, uniform, sketch, exact, raw = (row for row, _ in rows)
    assert naive.bytes_per_token == 6 * 32
    assert packed.bytes_per_token < naive.bytes_per_token
    assert packed.kl == naive.kl
    assert uniform.kl == pytest.approx(naive.kl, rel=0.2)  # the same ids, other rounding
    assert exact.kl < sketch.kl < uniform.kl
    assert exact.cosine_near > sketch.cosine_near > uniform.cosine_near
    assert exact.forward_kl_near > max(sketch.forward_kl_near, uniform.forward_kl_near) > 0.999
    assert exact.cosine_far > 0.99
    assert (raw.bytes_per_token, raw.basis_mb) == (2 * 24, 2 * 24 * 300 / 1e6)
    assert raw.kl < 1e-4
    assert min(raw.cosine_far, raw.cosine_near, raw.forward_kl_far, raw.forward_kl_near) > 0.998
    for row, targets in rows:
        assert row.encode_tokens_per_s > 0
        assert row.decode_tokens_per_s > 0
        assert len(targets) == len(states.teacher)
    rates.plot([row for row, _ in rows], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_what_distillkit_does_not_keep_is_spread_evenly(rates):
    """Its own codec runs by hand alone: `rate_distortion.py --distillkit DIR`."""
    from distillkit_codec import as_targets

    ids = torch.tensor([[7, 2, 0], [1, 3, 9]])
    # Of the second token more than everything, as bfloat16 may round it: its least mass is 1e-8 an id.
    logprobs = torch.tensor([[0.5, 0.25, 0.125], [0.9, 0.1, 0.01]]).log()
    targets = as_targets(ids, logprobs, torch.tensor([7, 1]), np.array([2, 5], np.uint16), 10, 8)
    expected = torch.tensor([[0.125 / 7] * 10, [1e-8] * 10]).scatter(-1, ids, logprobs.exp())
    torch.testing.assert_close(targets.everywhere().exp(), expected)
    assert targets.leading(8, 2)[2].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ((), "is not a checkout of DistillKit"),
        (("distillkit/compression/",), "codec cannot be imported from .*LogprobCompressor"),
        (("distillkit/compression/", "distillkit/__init__.py:import no_such_library"), "no_such_library"),
    ],
)
def test_a_folder_that_has_no_codec_of_distillkit_is_refused(rates, monkeypatch, tmp_path, made, said):
    import distillkit_codec

    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in made:
        path, _, content = name.partition(":")
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (tmp_path / path).mkdir()
        else:
            (tmp_path / path).write_text(content)
    try:
        with pytest.raises(SystemExit, match=said):
            distillkit_codec.Codec(tmp_path)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "distillkit"]:
            del sys.modules[name]


def test_sizes_are_cut_into_tiles_as_the_image_processor_does(monkeypatch):
    """And of those that it says, one really has another row for one of the two."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from same_tiles import TILES, differing, tiles

    found = differing(100, 420)
    assert (100, 399) in found
    assert (300, 200) not in found
    for size in ((100, 399), (399, 100), (300, 200), (77, 77), (640, 481)):
        for tile in TILES:
            cut = SmolVLMImageProcessorPil(
                size={"longest_edge": 4 * tile}, max_image_size={"longest_edge": tile}
            )
            made = cut([[noise_image(0, size)]], return_row_col_info=True)
            assert tiles(*size, tile) == (made["rows"][0][0], made["cols"][0][0])


@pytest.mark.slow
def test_dbild_benchmark_prints_its_rows():
    rows = json.loads(output_of(BENCHMARKS / "dbild.py", "--tokens", "20", "--json"))
    assert [row["k"] for row in rows] == [8, 16, 32, 64, 128, 256]
    assert set(rows[0]) >= {"pairwise_ms", "ours_ms", "pairwise_mb", "ours_mb"}
    assert rows[-1]["ours_mb"] < rows[-1]["pairwise_mb"] / 10


@pytest.mark.slow
def test_the_benchmark_of_cells_prints_what_they_take():
    arguments = ["--pairs", "300:400:150", "--tokens", "20", "--repeats", "1", "--json"]
    rows = json.loads(output_of(BENCHMARKS / "cells.py", *arguments))
    assert all(row["ms"] > 0 for row in rows)
    ids, cells = ([row for row in rows if row["over"] == over] for over in ("ids", "cells"))
    assert [row["way"] for row in ids] == [row["way"] for row in cells] == ["cached", "live"]
    assert all(row["arrays"] > 1 for row in (*ids, *cells))


def test_merging_brings_a_cache_nearer_to_the_live_teacher(rates):
    """By KL always: merging outcomes never increases one."""
    import cells

    from cachekd.cache.roundtrip import roundtrip
    from cachekd.losses.cells import Cells

    states = small_states(rates)
    laid = Cells.of(cells.map_like_a_real_one(300, 400, 100))
    found = {}
    for tail in ("none", "exact"):
        cached, _ = roundtrip(states.teacher, states.head, states.token_ids, tail=tail, top_k=128)
        found[tail] = [cells.worth(states, over, cached) for over in (None, laid)]
        plain, merged = found[tail]
        assert merged["kl"] < plain["kl"]
    for exact, uniform in zip(found["exact"], found["none"], strict=True):
        assert exact["cosine_far"] > 0.999 > uniform["cosine_far"]


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


@pytest.mark.slow
def test_the_gpu_benchmark_measures_everything_where_there_is_no_gpu(tmp_path):
    """All of it at tiny sizes, so that it works the first time that a GPU is there."""
    path = tmp_path / "found.json"
    output_of(BENCHMARKS / "gpu.py", "--size", "tiny", "--workers", "2", "--json", str(path))
    found = json.loads(path.read_text())
    measured = found["measured"]
    steps = ["cached", "naive", "ce", "cached_no_vsd", "live", "recomputed", "half_student"]
    assert not [name for name, row in measured.items() if "error" in row or "left_out" in row]
    assert all(measured[name]["ms"] > 0 for name in ("forward", *steps))
    assert measured["dump"]["samples"] == 64
    # FLOPs are counted, not timed, so the ways can be compared.
    flops = {name: measured[name]["tflop"] for name in steps}
    assert flops["ce"] < 1.01 * flops["cached_no_vsd"] < flops["cached"] < flops["live"] < flops["naive"]
    assert flops["cached"] < flops["recomputed"] == flops["half_student"]
    assert "Self CPU" in path.with_suffix(".profile.txt").read_text()
    assert {row["name"] for row in found["aims"]} >= {"dump / bare forward", "cached without L_VSD / CE"}


def test_the_gpu_benchmark_leaves_out_what_there_is_no_time_for_and_goes_on_after_a_failure(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    session = gpu.Session(lab=None, ends=gpu.time.monotonic() + 60, path=tmp_path / "found.json")
    session.measure("forward", lambda lab: {"tokens_per_s": 90.0}, 1)
    session.measure("naive", lambda lab: {"ms": 1.0}, 3600)
    session.measure("live", lambda lab: lab.nothing, 1)
    session.measure("dump", lambda lab: {"tokens_per_s": 80.0}, 1)
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["measured"]) == ["forward", "naive", "live", "dump"]
    assert "it takes 3600" in found["measured"]["naive"]["left_out"]
    assert "AttributeError" in found["measured"]["live"]["error"]
    aim = {"name": "dump / bare forward", "value": 90 / 80, "aim": 1.05, "at_most": True, "met": False}
    assert found["aims"] == [aim]
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()] == list(found["measured"])
    assert "AttributeError" in said.err


@pytest.mark.slow
def test_the_memory_benchmark_needs_less_and_says_the_same_loss():
    # So many tokens that logits outweigh the libraries that are imported meanwhile, some 40 MB.
    printed = output_of(BENCHMARKS / "train_memory.py", "--vocab", "50000", "--json")
    naive, live, cached, recomputed = json.loads(printed)
    assert live["loss"] == pytest.approx(naive["loss"], rel=1e-4)
    assert cached["loss"] == pytest.approx(recomputed["loss"], rel=1e-4)
    assert cached["peak_mb"] < naive["peak_mb"]


@pytest.mark.slow
def test_memory_by_part_is_what_a_step_takes():
    """Computed from the configurations alone, within a tenth of the peak that was measured."""
    kept, recomputed = json.loads(output_of(BENCHMARKS / "memory_by_part.py", "--json"))
    for row in (kept, recomputed):
        assert row["peak"] == pytest.approx(row["measured"], rel=0.1)
        assert row["optimizer"] == 2 * row["gradients"] == 2 * row["weights"]
    assert recomputed["activations"] + recomputed["switched"] < 0.2 * (kept["activations"] + kept["switched"])


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


# ---- distillation across tokenizers, on text


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import across_tokenizers_text

    return across_tokenizers_text


def test_uld_compares_sorted_probabilities(texts):
    import uld

    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        torch.randn(3, 20, generator=generator),
        torch.randn(3, 33, generator=generator).softmax(-1),
    )
    expected = 0.0
    for logits, probabilities in zip(ours.softmax(-1).tolist(), theirs.tolist(), strict=True):
        one, other = sorted(logits, reverse=True), sorted(probabilities, reverse=True)
        expected += sum(abs(p - q) for p, q in zip(one, other, strict=False))
    assert float(uld.uld_loss(ours, theirs.sort(-1, descending=True).values)) == pytest.approx(expected)


def test_the_next_byte_is_what_its_tokens_begin_with(texts):
    from heard_text import END, OTHER, Heard, by_next_byte, next_byte_kl

    tokens = TokenBytes((b"<e>", b"ab", b"b", b"a", b"", b"<x>"), frozenset({0, 5}), 0)
    p = torch.tensor([[0.1, 0.2, 0.3, 0.25, 0.05, 0.1]])
    rows = by_next_byte(p.log(), tokens).exp()
    expected = {ord("a"): 0.45, ord("b"): 0.3, END: 0.1, OTHER: 0.15}
    assert {place: pytest.approx(float(rows[0, place])) for place in expected} == expected
    assert float(rows.sum()) == pytest.approx(1)
    q = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.15, 0.1]])
    teacher, student = (
        Heard(next_byte=[{0: by_next_byte(x.log(), tokens)[0], other: rows[0].log()}], truth=[b"b"])
        for x, other in ((p, 1), (q, 2))
    )
    found = next_byte_kl(teacher, student)  # of the one place that both have
    expected = 0.45 * math.log(0.45 / 0.35) + 0.15 * math.log(0.15 / 0.25)
    assert found["next_byte_kl"] == pytest.approx(expected, rel=1e-4)
    assert found["next_byte_top1"] == 0


def test_passages_are_whole_paragraphs_of_files_of_their_own(texts, tmp_path):
    import passages

    assert passages.write_passages(tmp_path, ["networkx"], 20, 10) == (20, 10)
    files = []
    for name in ("train", "held_out"):
        records = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        files.append({record["id"].split("#")[0] for record in records})
        assert all(record["messages"][1]["content"].endswith(".") for record in records)
    assert not files[0] & files[1]


@pytest.mark.slow
def test_text_is_distilled_across_tokenizers_and_measured(texts, tmp_path, monkeypatch, capsys):
    """All of it, on models with random weights; without its own term ULD is `cachekd train` by L_CE."""
    teacher = save_lm(tmp_path / "teacher", seed=1, rows=720, sharp=15.0, shape="mistral")
    student = save_lm(tmp_path / "student", seed=2)
    monkeypatch.setattr(texts.train_uld, "__kwdefaults__", {"weight": 0.0})
    monkeypatch.setitem(texts.SETTINGS, "dtype", "float32")
    sizes = {"train": 8, "held_out": 3, "epochs": 2, "seeds": 1, "packages": "networkx"}
    texts.main(tmp_path / "out", **sizes, teacher=teacher, student=student, as_json=True)
    printed = capsys.readouterr().out
    rows = {row["method"]: row for row in json.loads(printed[printed.index("[\n {") :])}
    assert list(rows) == ["teacher", "before", "ce", "cells", "exact", "uld"]
    assert rows["teacher"]["next_byte_kl"] == 0
    assert rows["before"]["next_byte_kl"] > 0.1
    runs = tmp_path / "out" / "pipeline"
    ce, uld, cells = (
        torch.cat([weight.flatten() for weight in load_file(path / "model.safetensors").values()])
        for path in (runs / name / "seed-0" / "student" for name in ("ce", "uld", "cells"))
    )
    assert (uld - ce).abs().max() < 2e-6  # gradients are summed in another order
    assert (cells - ce).abs().max() > 1e-4


def test_the_benchmark_of_tokenizers_counts_what_they_have_in_common(tmp_path):
    """The demo's, and one that learned from other words: both directions, three kinds of text."""
    demo = ROOT / "examples" / "easy_vqa" / "student" / "tokenizer.json"
    other = tmp_path / "tokenizer.json"
    tiny_processor().tokenizer.backend_tokenizer.save(str(other))
    named = [f"demo={demo}", f"tiny={other}"]
    there, back = json.loads(output_of(BENCHMARKS / "across_tokenizers.py", *named, "--json"))
    assert (there["teacher"], there["student"], back["teacher"]) == ("demo", "tiny", "tiny")
    assert there["shared"] == back["shared"] > 256
    for row in (there, back):
        assert row["table_mb"] > 0
        for text in ("answers", "code", "cjk"):
            assert row[text]["differ"] == 0
            assert 0.5 < row[text]["one_to_one"] <= row[text]["common"] <= 1
            assert 0.9 < row[text]["one_cell"] <= 1
