"""`cachekd inspect`: what it counts is what is there, by a slow reference; its page stands alone."""

from __future__ import annotations

import json
import re
import weakref
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cachekd.cache import LogitCache, Manifest
from cachekd.cache.derive import merge_caches
from cachekd.cache.overview import Bar, k_bars, lineage
from cachekd.cache.recompress import recompress
from cachekd.cache.summary import (
    Answers,
    CacheSummary,
    Entropy,
    ShardSummary,
    bytes_by_part,
    spread,
    summarise,
)
from cachekd.cache.targets import entropy, entropy_bounds
from cachekd.errors import CachekdError
from cachekd.report.pages import inspect_page
from cachekd.report.peek import Alternative, PeekedSample, PeekedToken
from cachekd_cli.console import console
from cachekd_cli.inspect import SHOWN, shard_table
from cachekd_cli.main import app
from caches import ROOT, copied, dump_cache, flip, reseal, write_data


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teacher_path) -> dict[str, Path]:
    """Without a tail, with one, and two dumps merged, each with a sketch of its own."""
    folder = tmp_path_factory.mktemp("inspected")
    parts = [write_data(folder / f"data-{start}", 9, start=start) for start in (0, 9)]
    found = {
        "none": dump_cache(folder / "none", teacher_path, parts[0], tail="none", top_k=4),
        "sketch": dump_cache(folder / "sketch", teacher_path, parts[0], top_k=4),
    }
    second = dump_cache(folder / "second", teacher_path, parts[1], top_k=4)
    merge_caches([found["sketch"], second], folder / "merged")
    return {**found, "merged": folder / "merged"}


def rebuilt(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all tokens, in the cache's order: ids [N] and logprobs over the whole vocabulary [N, V]."""
    cache = LogitCache(path)
    samples = [cache[key] for key in cache]
    return torch.cat([one.token_ids for one in samples]), torch.cat([one.everywhere() for one in samples])


def entropies(logprobs: torch.Tensor) -> torch.Tensor:
    p = logprobs.double().softmax(-1)
    return -(p * p.log()).nan_to_num(0.0).sum(-1)


@pytest.mark.parametrize("name", ["none", "sketch", "merged"])
def test_the_numbers_are_those_of_a_slow_count(caches, name):
    summary, cache = summarise(caches[name]), LogitCache(caches[name])
    token_ids, logprobs = rebuilt(caches[name])
    answers = logprobs.gather(-1, token_ids[:, None])[:, 0].double()
    assert summary.samples == len(cache)
    assert summary.tokens == len(token_ids) == sum(summary.k.values())
    assert {"k": summary.k, "knee": summary.knee} == cache.histogram()
    assert summary.answers.top1 == pytest.approx(float((logprobs.argmax(-1) == token_ids).float().mean()))
    assert summary.answers.logprob == pytest.approx(float(answers.mean()), abs=1e-3)  # `gather` takes float16
    assert summary.answers.probability == pytest.approx(float(answers.exp().mean()), rel=1e-3)
    assert summary.entropy.method == "all tokens"
    assert summary.entropy.mean == pytest.approx(float(entropies(logprobs).mean()), abs=1e-4)
    assert sum(summary.entropy.counts) == summary.tokens
    for low, high, count in zip(
        summary.entropy.edges, summary.entropy.edges[1:], summary.entropy.counts, strict=False
    ):
        found = entropies(logprobs)
        assert count == int(((found >= low) & (found < high)).sum())
    by_shard = sum(shard.logprob * shard.tokens for shard in summary.shards) / summary.tokens
    assert by_shard == pytest.approx(summary.answers.logprob, abs=1e-6)


def test_a_merged_cache_shows_its_sources_and_sketches(caches):
    summary = summarise(caches["merged"])
    assert len(summary.manifest.sketches) == 2
    assert {shard.source for shard in summary.shards} == {0, 1}
    text = CliRunner().invoke(app, ["inspect", str(caches["merged"])]).output
    for words in ("data 0", "data 1", "sketch 0", "sketch 1", "of 2 dumps"):
        assert words in text


def test_a_derived_cache_shows_how_it_was_made(caches, tmp_path):
    cut = recompress(caches["merged"], tmp_path / "cut", top_k=2)
    merge, step = lineage(cut).values()
    parents = Manifest.load(caches["merged"])
    assert merge.startswith("merge (cachekd")
    assert f"top_k {parents.codec.top_k}, tail {parents.codec.tail}, manifest {parents.sha256[:12]}" in step
    assert f"gradient cosine {cut.lineage[-1].fidelity.cosine:.4f}" in step
    text = " ".join(CliRunner().invoke(app, ["inspect", str(tmp_path / "cut")]).output.split())
    for words in ("made by 0", "made by 1", "not as the dump"):
        assert words in text
    assert "recompress (cachekd" in inspect_page(summarise(tmp_path / "cut"))
    assert lineage(Manifest.load(caches["sketch"])) == {}


@pytest.mark.parametrize("name", ["none", "sketch"])
def test_every_byte_of_a_shard_is_in_one_part(caches, name):
    for file in (caches[name] / "shards").iterdir():
        parts = bytes_by_part(file)
        assert parts.total() == file.stat().st_size
        assert ("sketch codes" in parts) == (name == "sketch")
        assert "other" not in parts
        with zipfile.ZipFile(file) as archive:
            chunks = {n: len(archive.read(n)) for n in archive.namelist() if "/c/" in n}
        assert parts["logprobs"] == sum(size for n, size in chunks.items() if n.startswith("topk_gaps/"))
        assert parts["container"] == file.stat().st_size - sum(chunks.values())
    summary = summarise(caches[name])
    assert sum(summary.bytes_by_part.values()) == summary.bytes


def test_the_kept_entries_bound_the_entropy(caches):
    cache = LogitCache(caches["sketch"])
    targets, _ = cache.shard_targets(0)
    least, most = entropy_bounds(targets)
    found = entropy(targets)
    assert bool((least <= found + 1e-4).all())
    assert bool((found <= most + 1e-4).all())
    assert float((most - least).min()) > 0.5  # far apart here, so that being between says something


def test_entropy_at_some_tokens_is_of_evenly_spread_ones(caches):
    summary = summarise(caches["sketch"], entropy_tokens=7)
    _, logprobs = rebuilt(caches["sketch"])
    places = spread(7, summary.tokens)
    assert places.diff().min() >= summary.tokens // 7
    assert (summary.entropy.method, summary.entropy.tokens) == ("evenly spread tokens", 7)
    assert summary.entropy.mean == pytest.approx(float(entropies(logprobs)[places].mean()), abs=1e-4)
    whole = summarise(caches["sketch"]).entropy
    assert (summary.entropy.least, summary.entropy.most) == (whole.least, whole.most)


def test_one_shard_is_in_memory_at_a_time(caches, monkeypatch):
    import cachekd.cache.summary as module

    read, alive = module.listed_shard, []

    def watched(*arguments, **options):
        assert [shard() for shard in alive] == [None] * len(alive)
        shard = read(*arguments, **options)
        alive.append(weakref.ref(shard.targets.logprobs))
        return shard

    monkeypatch.setattr(module, "listed_shard", watched)
    summarise(caches["merged"])
    assert len(alive) == 4


def test_a_damaged_shard_is_refused_by_name(caches, tmp_path):
    path = copied(caches["sketch"], tmp_path / "damaged")
    shard = sorted((path / "shards").iterdir())[1]
    flip(shard, shard.stat().st_size // 2)
    with pytest.raises(CachekdError, match="damaged") as caught:
        summarise(path)
    assert str(shard) in str(caught.value)


def test_samples_that_were_left_out_are_counted_by_reason(skipping_cache):
    summary = summarise(skipping_cache)
    assert sum(summary.skipped.values()) == 7
    assert "7 samples" in CliRunner().invoke(app, ["inspect", str(skipping_cache)]).output


def test_json_has_the_documented_keys_and_nothing_else(caches):
    result = CliRunner().invoke(app, ["inspect", str(caches["sketch"]), "--json"])
    found = json.loads(result.stdout)
    assert list(found) == list(CacheSummary.model_fields)
    again = CacheSummary.model_validate(found)
    assert again == summarise(caches["sketch"])
    undocumented = {"path", "samples", "answers", "entropy", "shards"}  # which say themselves what they are
    assert all(f.description for n, f in CacheSummary.model_fields.items() if n not in undocumented)


def test_the_terminal_page_has_it_all(caches, monkeypatch):
    monkeypatch.setattr(console, "_width", 120)
    summary = summarise(caches["sketch"])
    text = CliRunner().invoke(app, ["inspect", str(caches["sketch"])]).output
    for words in (
        f"{summary.tokens:,}",
        f"{summary.bytes_per_token:.1f}",
        f"{100 * summary.answers.top1:.2f} %",
        "gradient cosine",
        "sketch codes",
        summary.manifest.fingerprints.tokenizer,
        "00001.zarr.zip",
        "█",
    ):
        assert words in text


def test_a_long_list_of_shards_is_cut(monkeypatch):
    shards = [
        ShardSummary(
            name=f"{n:05d}.zarr.zip",
            source=0,
            samples=1,
            tokens=2,
            bytes=3,
            mean_k=4,
            top1=1,
            logprob=-1,
            kl=None,
        )
        for n in range(50)
    ]
    monkeypatch.setattr(console, "_width", 160)
    with console.capture() as captured:
        console.print(shard_table(shards))
    names = re.findall(r"\d{5}\.zarr", captured.get())
    assert len(names) == SHOWN - 1
    assert names[-1] == "00049.zarr"
    assert f"{50 - len(names)} more" in captured.get()


def test_bins_of_k_hold_every_token():
    histogram = Counter({2: 5, 5: 1, 6: 2, 47: 3, 70_000 - 5_000: 1})
    bars = k_bars(histogram)
    assert sum(bar.value for bar in bars) == histogram.total()
    assert bars[0] == Bar("2", 5)
    assert Bar("5-6", 3) in bars


def hostile_cache(caches: dict[str, Path], out: Path) -> Path:
    """Its texts try to be markup and to clear the screen."""
    path = copied(caches["sketch"], out)

    def change(values):
        values["teacher"]["name"] = "<script>alert(1)</script>[red]x[/]\x1b[2J"
        values["sources"][0]["data"]["path"] = "</td><img src=x onerror=alert(2)>"

    reseal(path / "manifest.json", change)
    return path


def test_the_page_stands_alone_and_escapes(caches, tmp_path):
    path, page = hostile_cache(caches, tmp_path / "cache"), tmp_path / "page.html"
    result = CliRunner().invoke(app, ["inspect", str(path), "--html", str(page)])
    assert result.exit_code == 0
    html = page.read_text()
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert re.findall(r"url\((?!#)", html) == []
    assert re.findall(r"(?:src|href)=\"(?!#)", html.replace("xlink:href", "href")) == []
    assert html.count("<svg") == 6  # three of them by shard
    summary = summarise(path)
    assert f"{summary.answers.probability:.4f}" in html


def test_the_terminal_shows_hostile_texts_as_they_are(caches, tmp_path):
    text = CliRunner().invoke(app, ["inspect", str(hostile_cache(caches, tmp_path / "cache"))]).output
    assert "\x1b[2J" not in text
    assert r"\x1b[2J" in text
    assert "[red]x[/]" in text


def test_every_key_of_the_json_is_in_the_documentation():
    text = (ROOT / "docs" / "how-to" / "inspecting.md").read_text()
    models = (CacheSummary, Answers, Entropy, ShardSummary, PeekedSample, PeekedToken, Alternative)
    names = {name for model in models for name in model.model_fields}
    assert {name for name in names if f"`{name}`" not in text} == set()
