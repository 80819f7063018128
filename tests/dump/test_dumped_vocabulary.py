"""What token ids stand for: whoever dumps, and however often, it is what the tokenizer says, or not there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from cachekd.cache import LogitCache, Manifest, verify_files
from cachekd.cache.build import CacheBuild, find_plan
from cachekd.cache.plan import FinishedShard, Plan
from cachekd.config import DumpConfig
from cachekd.dump import dump, estimate_dump
from cachekd.errors import CachekdError
from cachekd.models import ModelFiles
from cachekd_cli.main import app
from caches import (
    SMALL,
    copied,
    dump_cache,
    files_of,
    flip,
    reseal,
    times_of,
)
from tiny import save_vlm, tiny_processor

FILE = "vocabulary.zarr.zip"


def config(teacher: Path, data: Path, out: Path, **changes: Any) -> DumpConfig:
    return DumpConfig(teacher=str(teacher), data=str(data), out=out, **{**SMALL, "tail": "none", **changes})


@pytest.fixture(scope="module")
def plain(tmp_path_factory, teacher_path, data_path) -> Path:
    return dump_cache(tmp_path_factory.mktemp("plain") / "c", teacher_path, data_path, tail="none")


@pytest.fixture
def cache(tmp_path, plain) -> Path:
    return copied(plain, tmp_path / "c")


# ---- what is in it


def test_a_dump_says_what_its_tokenizers_ids_stand_for(plain, teacher_path):
    files, opened = ModelFiles(teacher_path), LogitCache(plain)
    table, tokenizer = opened.vocabulary, files.processor.tokenizer
    assert table == files.token_bytes
    assert len(table) == len(tokenizer) == opened.manifest.teacher.vocab_size
    # Against the tokenizer itself: an answer's bytes are its text.
    for key in opened:
        ids = opened[key].token_ids.tolist()
        joined = b"".join(table.contents[token] for token in ids)
        assert joined.decode() == tokenizer.decode(ids, skip_special_tokens=False)
    assert table.contents[table.end_of_turn] == b"<|end|>"


def test_the_estimate_counts_it(tmp_path, teacher_path, data_path):
    settings = config(teacher_path, data_path, tmp_path / "c")
    found = estimate_dump(settings)
    assert not (tmp_path / "c").exists()
    summary = dump(settings)
    assert found.vocabulary_bytes == summary.vocabulary_bytes == (tmp_path / "c" / FILE).stat().st_size
    assert found.size == found.shard_bytes + found.sketch_bytes + found.vocabulary_bytes
    tokens = Manifest.load(tmp_path / "c").vocabulary.tokens
    for command in (["inspect", str(tmp_path / "c")],):
        shown = CliRunner().invoke(app, command)
        assert f"{tokens:,} tokens" in shown.output


@pytest.fixture(scope="module")
def untold(tmp_path_factory) -> Path:
    """A teacher whose tokenizer decodes by a regular expression: what a token stands for nobody can tell."""
    processor = tiny_processor()
    backend = processor.tokenizer.backend_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace(Regex("Ġ"), " "), decoders.Fuse()])
    names = {"pad_token": "<pad>", "eos_token": "<|end|>"}
    more = [f"<{name}>" for name in ("image", "|system|", "|user|", "|assistant|")]
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=more, **names
    )
    return save_vlm(tmp_path_factory.mktemp("untold") / "t", processor, seed=4)


def test_a_tokenizer_that_does_not_say_it_stops_no_dump(tmp_path, untold, data_path, caplog):
    with pytest.raises(CachekdError, match="cannot be told"):
        _ = ModelFiles(untold).token_bytes
    settings = config(untold, data_path, tmp_path / "c")
    with caplog.at_level(logging.WARNING):
        summary = dump(settings)
    (said,) = [record.message for record in caplog.records if "token ids stand for" in record.message]
    assert "Replace with a regular expression" in said
    assert summary.finished
    assert summary.vocabulary_bytes == 0
    assert LogitCache(tmp_path / "c").vocabulary is None
    assert FILE not in files_of(tmp_path / "c")
    assert verify_files(tmp_path / "c") == []
    before = times_of(tmp_path / "c")
    assert dump(settings).new_tokens == 0
    assert times_of(tmp_path / "c") == before
    assert "not in it" in CliRunner().invoke(app, ["inspect", str(tmp_path / "c")]).output


# ---- kill, resume, several processes


def test_what_was_lost_before_the_end_is_written_again(cache, teacher_path, data_path):
    """As after a kill between the plan and this file."""
    whole = files_of(cache)
    (cache / "manifest.json").unlink()
    flip(cache / FILE, 900)  # what a disk has lost in silence is written again as well
    assert dump(config(teacher_path, data_path, cache)).new_tokens == 0
    assert files_of(cache) == whole
    for name in ("manifest.json", FILE):
        (cache / name).unlink()
    before = times_of(cache)
    with pytest.raises(CachekdError, match="the vocabulary is missing"):
        CacheBuild(cache, find_plan(cache)).assemble(2)
    assert dump(config(teacher_path, data_path, cache)).new_tokens == 0
    assert files_of(cache) == whole
    assert {name: time for name, time in times_of(cache).items() if name in before} == before


def test_several_processes_write_the_same(tmp_path, plain, teacher_path, data_path):
    shares = [config(teacher_path, data_path, tmp_path / "c", rank=rank, world_size=2) for rank in (1, 0)]
    assert [dump(share).finished for share in shares] == [False, True]
    assert (tmp_path / "c" / FILE).read_bytes() == (plain / FILE).read_bytes()
    assert Manifest.load(tmp_path / "c").vocabulary == Manifest.load(plain).vocabulary


def test_a_dump_that_began_without_goes_on_without(cache, teacher_path, data_path):
    """As an earlier version began it."""
    for name in ("manifest.json", FILE):
        (cache / name).unlink()
    reseal(cache / "dump" / "plan.json", lambda values: values.pop("vocabulary"))
    sha256 = Plan.read(cache / "dump" / "plan.json").sha256
    reseal(cache / "dump" / "00000.json", lambda values: values.update(plan_sha256=sha256))
    (cache / "dump" / "00001.json").unlink()
    first = times_of(cache)["shards/00000.zarr.zip"]
    summary = dump(config(teacher_path, data_path, cache))
    assert (summary.finished, summary.vocabulary_bytes) == (True, 0)
    assert times_of(cache)["shards/00000.zarr.zip"] == first
    assert FILE not in files_of(cache)
    assert b"vocabulary.zarr.zip" not in (cache / "manifest.json").read_bytes()
    assert verify_files(cache) == []
    assert FinishedShard.read(cache / "dump" / "00001.json").plan_sha256 == sha256


def test_another_one_than_the_plans_is_not_written(cache, teacher_path, data_path):
    """As another version of this code might read the tokenizer."""
    (cache / "manifest.json").unlink()
    (cache / FILE).unlink()
    reseal(cache / "dump" / "plan.json", lambda values: values["vocabulary"].update(sha256="0" * 64))
    with pytest.raises(CachekdError, match="gives another one than when the dump began") as caught:
        dump(config(teacher_path, data_path, cache))
    assert "dump into a new folder" in caught.value.fix
    assert not (cache / FILE).exists()
