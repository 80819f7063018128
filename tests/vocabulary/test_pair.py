"""Maps are found once per pair of vocabularies, and kept."""

from __future__ import annotations

import os

import numpy as np
import pytest

from cachekd.vocabulary import CellMap, Lead, VocabularyPair
from cachekd.vocabulary.cells import CellFinder
from vocabularies import vocabulary

TEACHER = vocabulary(b"a", b" ab", b"ab", "<end>", end=3)
STUDENT = vocabulary("<stop>", b"b", b"a", end=0)
LEAD = Lead("teacher", b" ")


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHEKD_HOME", str(tmp_path))
    return tmp_path / "vocabularies"


def no_finding(*_args, **_options):
    raise AssertionError("the map was to be read")


def same(one: CellMap, other: CellMap) -> bool:
    return (
        np.array_equal(one.teacher, other.teacher)
        and np.array_equal(one.student, other.student)
        and (one.cells, one.shared) == (other.cells, other.shared)
        and one.teacher.dtype == other.teacher.dtype == one.student.dtype == np.int32
    )


def test_a_map_is_found_once_and_then_read(home, monkeypatch):
    found = VocabularyPair.of(TEACHER, STUDENT, "cells")
    led = found.cells_after(LEAD)
    assert len(list(home.iterdir())) == 2
    monkeypatch.setattr(CellFinder, "__init__", no_finding)
    again = VocabularyPair.of(TEACHER, STUDENT, "cells")
    assert same(again.cells, found.cells)
    assert same(again.cells_after(LEAD), led)


def test_the_key_is_all_that_a_map_depends_on(home):
    other = vocabulary("<stop>", b"b", b"a")
    for teacher, student, kind in (
        (TEACHER, STUDENT, "cells"),
        (TEACHER, STUDENT, "exact"),
        (STUDENT, TEACHER, "cells"),
        (TEACHER, other, "cells"),
    ):
        pair = VocabularyPair.of(teacher, student, kind)
        assert same(pair.cells, CellMap.build(teacher, student, exact=kind == "exact"))
        pair.cells_after(LEAD)
        pair.cells_after(Lead("student", b" "))
    assert len(list(home.iterdir())) == 12


def of_other_sizes() -> CellMap:
    return CellMap.build(TEACHER, TEACHER)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", None])
def test_a_damaged_map_is_found_anew(home, content):
    found = VocabularyPair.of(TEACHER, STUDENT, "cells")
    [path] = home.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert same(VocabularyPair.of(TEACHER, STUDENT, "cells").cells, found.cells)
    assert path.read_bytes() == whole


def test_any_byte_of_a_map_may_be_damaged(home):
    """What zipfile, zlib and numpy say of it are errors of many kinds."""
    found = VocabularyPair.of(TEACHER, STUDENT, "cells")
    [path] = home.iterdir()
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        assert same(VocabularyPair.of(TEACHER, STUDENT, "cells").cells, found.cells), place


@pytest.mark.parametrize("name", ["teacher", "student", "counts"])
@pytest.mark.parametrize(
    "value", [np.zeros(2, np.int32), np.full(4, 9, np.int32), np.full(3, -2, np.int32), np.array(["x"])]
)
def test_a_map_that_does_not_fit_is_found_anew(home, name, value):
    found = VocabularyPair.of(TEACHER, STUDENT, "cells")
    [path] = home.iterdir()
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, name: value})
    again = VocabularyPair.of(TEACHER, STUDENT, "cells").cells
    assert same(again, found.cells) or (name == "counts" and len(value) == 2)


def test_where_nothing_can_be_kept_maps_are_found_all_the_same(monkeypatch, tmp_path):
    place = tmp_path / "home"
    place.write_text("a file where the folder would be")
    monkeypatch.setenv("CACHEKD_HOME", str(place))
    pair = VocabularyPair.of(TEACHER, STUDENT, "cells")
    assert same(pair.cells, CellMap.build(TEACHER, STUDENT))
    assert os.listdir(tmp_path) == ["home"]
