"""Cells, against what they are meant to be: written out slowly, summed by brute force, and enumerated."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cachekd.vocabulary import CellMap, TokenBytes
from cachekd.vocabulary.merges import Merges
from vocabularies import fast, vocabulary

BYTES = st.binary(min_size=1, max_size=4)
# Few different bytes, so that strings are shared; characters and parts of them, so that some are no UTF-8.
PIECES = st.lists(st.sampled_from([b"a", b"b", b" ", "é".encode(), b"\xc3", b"\xa9", b"\xff"]), max_size=4)
TEXTS = st.one_of(PIECES.map(b"".join), BYTES)
NAMES = st.sampled_from(["<end>", "<stop>", "<pad>"])


# So many strings of two letters that merges get in each other's way.
DENSE = st.text("ab", min_size=1, max_size=4).map(str.encode)


@st.composite
def vocabularies(draw):
    texts = draw(st.sampled_from([TEXTS, DENSE]))
    contents = draw(st.lists(st.one_of(texts, texts, texts, NAMES), min_size=1, max_size=30))
    names = [number for number, content in enumerate(contents) if isinstance(content, str)]
    end = draw(st.sampled_from([None, *names]))
    return vocabulary(*contents, end=end)


def slow_first(text: bytes, ids: dict[bytes, int], *, by_characters: bool) -> bytes | None:
    """The first token of a text, by merging the pair of the lowest id, as long as there is one."""
    parts = [text[n : n + 1] for n in range(len(text))]
    if by_characters:
        for size in (4, 3, 2):  # characters of a valid text are told by their bytes alone
            for at in range(len(text) - size + 1):
                piece = text[at : at + size]
                if is_character(piece) and piece in ids:
                    offsets = list(itertools.accumulate(map(len, parts), initial=0))
                    if at in offsets and at + size in offsets:
                        parts[offsets.index(at) : offsets.index(at + size)] = [piece]
    while True:
        ranked = [(ids[a + b], n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not ranked:
            break
        _, at = min(ranked)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    prefixes = [text[:size] for size in range(len(text), 0, -1)]
    return next((prefix for prefix in [*parts[:1], *prefixes] if prefix in ids), None)


def is_character(piece: bytes) -> bool:
    try:
        return len(piece.decode()) == 1
    except UnicodeDecodeError:
        return False


def texts_of(tokens: TokenBytes) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for number, content in enumerate(tokens.contents):
        if number not in tokens.special and content:
            found.setdefault(content, number)
    return found


def has_characters(tokens: TokenBytes) -> bool:
    """As SentencePiece has them: some single byte has two tokens, or bytes of characters have none."""
    texts = [content for n, content in enumerate(tokens.contents) if n not in tokens.special]
    single = [content for content in texts if len(content) == 1]
    return len(set(single)) < len(single) or not any(content[0] >= 0x80 for content in single)


def slow_cell(text: bytes, own: TokenBytes, other: TokenBytes) -> bytes | None:
    """The shared string that a text ends at."""
    ours, theirs = texts_of(own), texts_of(other)
    if text in ours and text in theirs:
        return text
    first = slow_first(text, theirs, by_characters=has_characters(other))
    return None if first is None else slow_cell(first, other, own)


@settings(max_examples=400, deadline=None)
@given(vocabularies(), vocabularies(), st.booleans())
def test_every_id_is_in_the_cell_that_the_definition_gives_or_in_none(teacher, student, exact):
    cells = CellMap.build(teacher, student, exact=exact)
    shared = texts_of(teacher).keys() & texts_of(student).keys()
    members = defaultdict(set)
    for side, other, ids in ((teacher, student, cells.teacher), (student, teacher, cells.student)):
        assert ids.shape == (len(side),)
        assert ids.dtype == np.int32
        for number, cell in enumerate(ids.tolist()):
            content = side.contents[number]
            if number in side.special or not content:
                continue
            end = content if content in shared else None if exact else slow_cell(content, side, other)
            assert (end is None) == (cell == -1)
            members[cell].add(end)
    members.pop(-1, None)
    assert all(len(strings) == 1 for strings in members.values())
    assert set().union(*members.values()) == shared
    assert cells.shared == len(shared)
    names = {*map(name_of(teacher), teacher.special)} & {*map(name_of(student), student.special)}
    assert cells.cells == len(shared) + len(names)
    for side, ids in ((teacher, cells.teacher), (student, cells.student)):
        for number in side.special:
            assert (ids[number] != -1) == (name_of(side)(number) in names)
            assert ids[number] not in members
    both = set(cells.teacher.tolist()) & set(cells.student.tolist())
    assert both - {-1} == set(range(cells.cells))


def name_of(tokens: TokenBytes):
    """The two tokens that end a turn are one name; other names are what they say."""
    return lambda number: None if number == tokens.end_of_turn else tokens.contents[number]


@settings(max_examples=100, deadline=None)
@given(vocabularies(), vocabularies())
def test_the_mass_in_cells_and_outside_of_them_adds_up_to_one(teacher, student):
    cells = CellMap.build(teacher, student)
    generator = np.random.default_rng(0)
    for ids in (cells.teacher, cells.student):
        mass = generator.dirichlet(np.ones(len(ids)))
        by_cell = np.bincount(ids + 1, mass, minlength=cells.cells + 1)
        assert by_cell.sum() == pytest.approx(1)
        assert by_cell[0] == pytest.approx(mass[ids == -1].sum())


@settings(max_examples=100, deadline=None)
@given(vocabularies(), st.randoms())
def test_a_permuted_copy_has_the_cells_of_its_original(tokens, generator):
    """Unless ids are ranks of something, all strings are shared: no rank is asked for."""
    order = list(range(len(tokens)))
    generator.shuffle(order)
    end = None if tokens.end_of_turn is None else order.index(tokens.end_of_turn)
    special = frozenset(n for n, original in enumerate(order) if original in tokens.special)
    copy = TokenBytes(tuple(tokens.contents[original] for original in order), special, end)
    cells = CellMap.build(tokens, copy)
    assert cells.student.tolist() == cells.teacher[order].tolist()
    assert (cells.teacher != -1).tolist() == [content != b"" for content in tokens.contents]


def test_cells_are_numbered_as_the_teacher_has_its_ids():
    teacher = vocabulary(b"a", b"ab", b"b", "<end>", b"c", end=3)
    student = vocabulary("<stop>", b"c", b"b", b"a", end=0)
    cells = CellMap.build(teacher, student)
    assert cells.teacher.tolist() == [0, 0, 1, 2, 3]
    assert cells.student.tolist() == [2, 3, 1, 0]
    assert (cells.cells, cells.shared) == (4, 3)


def test_names_and_texts_are_never_one_cell():
    """What one vocabulary writes as text, the other may have as a name of the same content."""
    cells = CellMap.build(vocabulary(b"<pad>", "<end>", end=1), vocabulary("<pad>", "<end>", "<stop>", end=2))
    assert cells.teacher.tolist() == [-1, 0]
    assert cells.student.tolist() == [-1, -1, 0]


def test_a_byte_that_has_two_tokens_has_one_cell():
    """As "<0x41>" and "A" in SentencePiece: all the mass is counted, whichever a model likes."""
    cells = CellMap.build(vocabulary(b"A", b"B"), vocabulary(b"A", b"B", b"B", b"A"))
    assert cells.student.tolist() == [0, 1, 1, 0]


def test_characters_are_symbols_of_a_vocabulary_that_has_them_behind_its_merges():
    """SentencePiece puts characters last; by rank alone é would be the last thing that is put together."""
    e = "é".encode()
    student = vocabulary(*(bytes([byte]) for byte in range(256)), b"t" + e, b"tt", b"t", e)
    assert Merges(student).first(b"tt" + e + b"!") == b"t"  # and then "té", which comes before "tt"
    assert Merges(student).first(b"tt" + e[:1] + b"!") == b"tt"
    # A byte-level vocabulary makes them by merges: what comes first in its table comes first.
    byte_level = vocabulary(*(bytes([byte]) for byte in range(256)), b"t\xc3", b"t" + e, e)
    assert Merges(byte_level).first(b"t" + e + b"!") == b"t" + e
    assert Merges(byte_level).first(b"t" + e[:1] + b"!") == b"t\xc3"


def test_a_token_goes_where_its_encoding_begins_and_not_its_longest_prefix():
    """The student merges "bb" before "ab": it writes "abb" as "a" and "bb"."""
    teacher, student = vocabulary(b"a", b"b", b"ab", b"abb"), vocabulary(b"a", b"b", b"bb", b"ab")
    assert CellMap.build(teacher, student).teacher.tolist() == [0, 1, 2, 0]


def test_of_two_ids_with_the_same_bytes_the_lower_one_is_the_rank():
    assert Merges(vocabulary(b"a", b"b", b"c", b"ab", b"bc", b"ab")).first(b"abc") == b"ab"


def test_a_long_chain_ends():
    """Each side has every second length: from 300 bytes down to one that both have."""
    teacher = vocabulary(b"a", *(b"a" * size for size in range(2, 300, 2)))
    student = vocabulary(b"a", *(b"a" * size for size in range(3, 300, 2)))
    cells = CellMap.build(teacher, student)
    assert set(cells.teacher) == set(cells.student) == {0}


def all_encodings(text: bytes, tokens: TokenBytes) -> list[tuple[int, ...]]:
    """Every sequence of tokens whose bytes are a text."""
    if not text:
        return [()]
    found = []
    for number, content in enumerate(tokens.contents):
        if text.startswith(content):
            found += [(number, *rest) for rest in all_encodings(text[len(content) :], tokens)]
    return found


def test_first_bytes_have_the_same_mass_in_cells_as_in_tokens():
    """Of a tiny alphabet: the marginals of the first byte, over the teacher's tokens and over cells."""
    generator = np.random.default_rng(1)
    strings = [bytes(letters) for size in (1, 2, 3, 4) for letters in itertools.product(b"ab", repeat=size)]
    for seed in range(20):
        random.seed(seed)
        teacher = vocabulary(b"a", b"b", *random.sample(strings[2:], 12))
        student = vocabulary(b"a", b"b", *random.sample(strings[2:], 12))
        cells = CellMap.build(teacher, student)
        mass = generator.dirichlet(np.ones(len(teacher)))
        by_cell = np.bincount(cells.teacher, mass, minlength=cells.cells)  # none is left out
        string_of = {cell: min(members(teacher, cells.teacher, cell), key=len) for cell in range(cells.cells)}
        for byte in (b"a", b"b"):
            direct = sum(p for p, content in zip(mass, teacher.contents, strict=True) if content[:1] == byte)
            summed = sum(p for cell, p in enumerate(by_cell) if string_of[cell][:1] == byte)
            assert summed == pytest.approx(direct)


def members(tokens: TokenBytes, ids: np.ndarray, cell: int) -> list[bytes]:
    return [content for content, there in zip(tokens.contents, ids.tolist(), strict=True) if there == cell]


def test_where_tokenisation_is_nested_cells_have_the_mass_of_the_texts_encodings():
    """The student's table is the beginning of the teacher's. Of each text of tokens that the teacher may say
    next, the student's encoding is found among all of its encodings, as the one of which merging makes it;
    the mass of a student's token is that of the texts whose encoding begins with it."""
    merges = [b"ab", b"ba", b"abab", b"aba", b"bb", b"abb", b"ababab", b"bba", b"aa"]
    teacher, student = vocabulary(b"a", b"b", *merges), vocabulary(b"a", b"b", *merges[:4])
    cells = CellMap.build(teacher, student)
    mass = np.random.default_rng(2).dirichlet(np.ones(len(teacher)))
    direct = defaultdict(float)
    for content, p in zip(teacher.contents, mass, strict=True):
        wanted = by_merges(content, student)
        assert wanted in all_encodings(content, student)
        direct[int(cells.student[wanted[0]])] += p
    by_cell = np.bincount(cells.teacher, mass, minlength=cells.cells)
    assert by_cell.tolist() == pytest.approx([direct[cell] for cell in range(cells.cells)])
    assert math.isclose(sum(direct.values()), 1)


def by_merges(text: bytes, tokens: TokenBytes) -> tuple[int, ...]:
    """A text's encoding, merge after merge in the order of the table, each wherever it can be made."""
    parts = [bytes([byte]) for byte in text]
    for joined in tokens.contents:
        at = 0
        while at < len(parts) - 1:
            if parts[at] + parts[at + 1] == joined:
                parts[at : at + 2] = [joined]
            at += 1
    return tuple(tokens.contents.index(part) for part in parts)


def test_the_first_token_is_that_of_the_trained_tokenizer_itself():
    """Of the library's: trained on a text, asked for every part of another one."""
    text = "the three dogs that sat there saw the other three; théâtre, 日本の犬 and 日本語, thrice"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(text.split(" "), trainer)
    tokens = TokenBytes.of(fast(bpe), None)
    merges = Merges(tokens)
    asked = [text[a:b] for a in range(len(text)) for b in range(a + 1, min(a + 9, len(text) + 1))]
    for part in asked:
        [first, *_] = bpe.encode(part).ids
        assert merges.first(part.encode()) == tokens.contents[first], part
