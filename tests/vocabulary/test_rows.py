"""Aligned rows, against the intersection of the two sets of ends, on random cuts of random text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.errors import CachekdError
from cachekd.vocabulary import PLAIN, Lead, VocabularyPair
from vocabularies import vocabulary

ANSWERS = st.lists(st.text("ab é日🐶\n", min_size=1, max_size=12).map(str.encode), min_size=1, max_size=4)


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    """No map is kept that another test finds."""
    monkeypatch.setenv("CACHEKD_HOME", str(tmp_path))


def cut_up(text: bytes, draw) -> list[bytes]:
    """A text in tokens: cut anywhere, in characters too."""
    ends = sorted(draw(st.sets(st.integers(1, len(text) - 1)))) if len(text) > 1 else []
    return [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]


def pair_of(teacher: list, student: list, kind="cells") -> VocabularyPair:
    """Vocabularies of just these tokens; <end> ends a turn, and is the id 0."""
    sides = []
    for tokens in (teacher, student):
        rest = sorted({token for token in tokens if token != "<end>"}, key=repr)
        sides.append(vocabulary("<end>", *rest, end=0))
    return VocabularyPair.of(*sides, kind)


def ids_of(tokens: list, side) -> list[int]:
    return [0 if token == "<end>" else side.contents.index(as_bytes(token)) for token in tokens]


def as_bytes(token) -> bytes:
    return token.encode() if isinstance(token, str) else token


def aligned(teacher: list, student: list, *, cut: bool = False, kind="cells", also: tuple = ()):
    """Align, and check the types; `also` are tokens that both vocabularies have besides."""
    pair = pair_of([*teacher, *also], [*student, *also], kind)
    found = pair.aligned(ids_of(teacher, pair.teacher), ids_of(student, pair.student), cut=cut)
    rows = {
        lead: list(zip(*map(np.ndarray.tolist, sides), strict=True)) for lead, sides in found.rows.items()
    }
    assert all(sides.dtype == np.int64 for both in found.rows.values() for sides in both)
    return pair, rows, found


def starts(tokens: list) -> dict[tuple[int, int], int]:
    """Of each place where a token begins, as the turn and the bytes read of it, the token's number."""
    found, turn, read = {}, 0, 0
    for number, token in enumerate(tokens):
        found[turn, read] = number
        turn, read = (turn + 1, 0) if token == "<end>" else (turn, read + len(token))
    return found


@settings(max_examples=300, deadline=None)
@given(ANSWERS, st.data())
def test_rows_are_where_both_sets_of_beginnings_meet_and_cells_agree(answers, data):
    ended = data.draw(st.booleans())
    sides = [[], []]
    for number, answer in enumerate(answers):
        for side in sides:
            side += cut_up(answer, data.draw)
            if ended or number < len(answers) - 1:
                side.append("<end>")
    teacher, student = sides
    pair, rows, found = aligned(teacher, student)
    theirs, ours = starts(teacher), starts(student)
    common = [(theirs[place], ours[place]) for place in sorted(theirs.keys() & ours.keys())]
    of_teacher = pair.cells.teacher[ids_of(teacher, pair.teacher)]
    of_student = pair.cells.student[ids_of(student, pair.student)]
    wanted = [(i, j) for i, j in common if of_teacher[i] == of_student[j] != -1]
    assert found.differs is None
    assert found.common == len(common)
    assert rows == ({PLAIN: wanted} if wanted else {})
    assert found.one_to_one == sum(teacher[i] == student[j] for i, j in common)


@settings(max_examples=200, deadline=None)
@given(ANSWERS, st.data())
def test_of_an_answer_that_ends_early_what_is_there_is_aligned_as_in_the_whole(answers, data):
    teacher, student = [], []
    for answer in answers:
        teacher += [*cut_up(answer, data.draw), "<end>"]
        student += [*cut_up(answer, data.draw), "<end>"]
    pair, whole, _ = aligned(teacher, student)
    shorter = data.draw(st.integers(0, len(student) - 1))
    one, other = ids_of(teacher, pair.teacher), ids_of(student, pair.student)[:shorter]
    found = pair.aligned(one, other, cut=True)
    assert found.differs is None
    none = np.empty(0, np.int64)
    got = list(zip(*map(np.ndarray.tolist, found.rows.get(PLAIN, (none, none))), strict=True))
    assert got == [(i, j) for i, j in whole.get(PLAIN, []) if j < shorter]


@settings(max_examples=200, deadline=None)
@given(st.text("ab é", min_size=1).map(str.encode).filter(lambda text: not text[:1].isspace()), st.data())
def test_a_blank_that_one_template_owns(text, data):
    """The rows behind the first token are those of the answers without it; the first has its lead."""
    side = data.draw(st.sampled_from(["teacher", "student"]))
    blank = data.draw(st.sampled_from([b" ", b"\n", b" \n"]))
    one, other = cut_up(text, data.draw), cut_up(text, data.draw)
    with_blank = [blank + one[0], *one[1:], "<end>"]
    both = [with_blank, [*other, "<end>"]]
    _, rows, found = aligned(*(both if side == "teacher" else both[::-1]), also=(one[0],))
    theirs, ours = starts([*one, "<end>"]), starts([*other, "<end>"])
    common = {(theirs[place], ours[place]) for place in theirs.keys() & ours.keys()}
    if side == "student":
        common = {(j, i) for i, j in common}
    assert found.differs is None
    assert found.common == len(common)
    led = rows.pop(Lead(side, blank), [])
    assert {*led, *itertools.chain(*rows.values())} <= common
    assert set(led) <= {(0, 0)}
    if one[0] == other[0]:
        assert led == [(0, 0)]
    assert PLAIN not in rows or (0, 0) not in rows[PLAIN]


def test_one_token_answers_and_empty_ones():
    _, rows, found = aligned([b"red", "<end>"], [b"red", "<end>"])
    assert rows == {PLAIN: [(0, 0), (1, 1)]}
    assert (found.common, found.one_to_one) == (2, 2)
    _, rows, found = aligned(["<end>"], ["<end>"])
    assert rows == {PLAIN: [(0, 0)]}
    _, rows, found = aligned([], [])
    assert (rows, found.common, found.differs) == ({}, 0, None)


def test_an_end_of_turn_on_one_side_alone_is_no_row():
    """A template that writes none, or an answer that was cut where it ends."""
    for teacher, student in (([b"red", "<end>"], [b"red"]), ([b"red"], [b"red", "<end>"])):
        _, rows, found = aligned(teacher, student)
        assert rows == {PLAIN: [(0, 0)]}
        assert found.differs is None


def test_several_turns_against_a_side_that_has_no_end_of_turn():
    """Its answers run on; a row behind the teacher's end of turn predicts the next answer."""
    teacher = vocabulary("<end>", b"re", b"d", b"no", end=0)
    student = vocabulary(b"r", b"e", b"d", b"no")
    found = VocabularyPair.of(teacher, student, "cells").aligned([1, 2, 0, 3, 0], [0, 1, 2, 3])
    assert found.differs is None
    assert found.common == 3
    [(i, j)] = [tuple(map(np.ndarray.tolist, sides)) for sides in found.rows.values()]
    # "re" is in the cell of no string that both have: the student begins with "r", which the teacher lacks.
    assert (i, j) == ([1, 3], [2, 3])


def test_white_space_as_tokens_of_its_own_needs_no_lead():
    """The other side is at the answer's first letter when the blank has been read."""
    _, rows, found = aligned([b"\n", b"red", "<end>"], [b"red", "<end>"])
    assert rows == {PLAIN: [(1, 0), (2, 1)]}
    _, rows, found = aligned(
        [b"red", "<end>", b"\n", b"no", "<end>", b"\n"], [b"red", "<end>", b"no", "<end>"]
    )
    assert rows == {PLAIN: [(0, 0), (1, 1), (3, 2), (4, 3)]}
    assert found.differs is None


def test_of_two_blanks_the_one_that_both_have_is_read_by_both():
    _, rows, _ = aligned([b"\n", b" red", "<end>"], [b" ", b"red", "<end>"])
    # Behind the line break the teacher says " red" and the student " ": no string that both have.
    assert rows == {PLAIN: [(2, 2)]}
    _, rows, _ = aligned([b"\n ", b"red", "<end>"], [b" red", b"red", "<end>"][:1] + ["<end>"])
    assert rows == {PLAIN: [(2, 1)]}


def test_where_the_white_space_in_front_differs_nothing_is_common():
    _, rows, found = aligned([b"\n", b" ", b"red", "<end>"], [b"\t", b" ", b"red", "<end>"])
    assert rows == {PLAIN: [(1, 1), (2, 2), (3, 3)]}
    assert found.common == 3


def test_white_space_before_the_end_of_turn_may_differ():
    """The end of turn is a row only where both have read the same."""
    _, rows, found = aligned([b"red", b"\n", "<end>"], [b"red", "<end>"])
    assert rows == {PLAIN: [(0, 0)]}
    assert (found.common, found.one_to_one, found.differs) == (2, 1, None)
    _, rows, _ = aligned([b"red", b" ", b"\n", "<end>"], [b"red", b" ", "<end>"])
    assert rows == {PLAIN: [(0, 0), (1, 1)]}


def test_white_space_that_is_not_ascii_is_trimmed_by_templates_too():
    """An ideographic space before an answer and a no-break space behind it; as a token, or in one."""
    wide, hard = "\u3000".encode(), "\u00a0".encode()
    _, rows, found = aligned([wide, b"red", hard, "<end>"], [b"red", "<end>"])
    assert rows == {PLAIN: [(1, 0)]}
    assert (found.common, found.differs) == (2, None)
    _, rows, found = aligned([wide + b"red", "<end>"], [b"red", "<end>"])
    assert rows == {Lead("teacher", wide): [(0, 0)], PLAIN: [(1, 1)]}
    _, rows, _ = aligned([wide[:1], wide[1:], b"red", "<end>"], [b"red", "<end>"])
    assert rows == {PLAIN: [(2, 0), (3, 1)]}
    # Two that end with the same bytes are different characters.
    _, rows, found = aligned([wide, b"red", "<end>"], ["\u2000".encode(), b"red", "<end>"])
    assert rows == {PLAIN: [(1, 1), (2, 2)]}
    assert found.common == 2


def test_two_blanks_of_one_length_are_not_the_same_bytes():
    _, rows, found = aligned([b"red", b"\n", "<end>"], [b"red", b" ", "<end>"])
    assert rows == {PLAIN: [(0, 0)]}
    assert found.one_to_one == 1
    _, rows, found = aligned([b"red", b"\n\t", "<end>"], [b"red", b"\n ", "<end>"], also=(b"\n",))
    assert rows == {PLAIN: [(0, 0), (1, 1)]}  # both begin with the line break
    assert found.one_to_one == 1


def test_other_names_match_their_like_alone():
    _, rows, found = aligned([b"a", "<box>", b"b", "<end>"], [b"a", "<box>", b"b", "<end>"])
    assert rows == {PLAIN: [(0, 0), (1, 1), (2, 2), (3, 3)]}
    _, rows, found = aligned([b"a", "<box>", b"b", "<end>"], [b"a", "<seg>", b"b", "<end>"])
    assert rows == {}
    assert found.differs == "answer 1: behind 'a' the teacher reads '<box>' and the student '<seg>'"
    _, rows, found = aligned([b"a", "<box>", b"b", "<end>"], [b"a", b"<box>", b"b", "<end>"])
    assert rows == {}
    assert (
        "from its byte 1 on the texts differ: the teacher reads 'a', the student 'a<box>b'" in found.differs
    )


def test_answers_that_differ_are_told_with_where_and_how():
    fine, decomposed = "answers of the ﬁne cat".encode(), b"answers of the fine cat"
    _, rows, found = aligned([b"yes", "<end>", fine, "<end>"], [b"yes", "<end>", decomposed, "<end>"])
    assert (rows, found.common, found.one_to_one) == ({}, 0, 0)
    assert found.differs == (
        "answer 2: from its byte 15 on the texts differ: the teacher reads 'wers of the ﬁne cat', "
        "the student 'wers of the fine cat'"
    )


def test_a_turn_that_only_one_side_has_is_told_unless_a_side_was_cut():
    teacher, student = [b"yes", "<end>"], [b"yes", "<end>", b"no", "<end>"]
    _, rows, found = aligned(teacher, student)
    assert (rows, found.differs) == ({}, "the student reads more: 'no<end>' behind the other's last token")
    _, rows, found = aligned(student, teacher)
    assert found.differs == "the teacher reads more: 'no<end>' behind the other's last token"
    _, rows, found = aligned([*teacher, "<end>"], teacher)  # an empty answer is one, too
    assert (rows, found.differs) == ({}, "the teacher reads more: '<end>' behind the other's last token")
    _, rows, found = aligned(teacher, student, cut=True)
    assert rows == {PLAIN: [(0, 0), (1, 1)]}


def test_a_cut_answer_must_be_the_beginning_of_the_other():
    _, _, found = aligned([b"yes", "<end>"], [b"ye"], cut=True)
    assert found.differs is None
    _, _, found = aligned([b"yes", "<end>"], [b"yet"], cut=True)
    assert "differ" in found.differs
    _, _, found = aligned([b"yes", "<end>"], [b"yes it is"], cut=True)
    assert "differ" in found.differs


def test_white_space_before_a_cut_is_the_beginning_of_that_of_the_other():
    """What is there of the student's answer may be the first line break, or the second: it is the first."""
    _, rows, found = aligned([b"\n", b"\n", b"red", "<end>"], [b"\n"], cut=True)
    assert rows == {PLAIN: [(0, 0)]}
    assert found.differs is None


def test_cells_after_a_lead_are_those_of_the_rest():
    teacher = vocabulary("<end>", b" red", b" ", b"red", b" r", b"  r", b"r", b"e", end=0)
    student = vocabulary("<end>", b"r", b"red", b"re", end=0)
    pair = VocabularyPair.of(teacher, student, "cells")
    led = pair.cells_after(Lead("teacher", b" "))
    red, r = range(2)
    # "e" begins with no blank, "  r" goes on with one; a blank alone says nothing of what follows it.
    assert led.teacher.tolist() == [-1, red, -1, -1, r, -1, -1, -1]
    assert led.student.tolist() == [-1, r, red, r]  # the teacher would go on with " r", then "e"
    assert (led.cells, led.shared) == (2, 2)
    assert pair.cells_after(PLAIN) is pair.cells
    assert pair.cells_after(Lead("teacher", b" ")) is led


def test_the_rest_of_a_token_goes_the_way_of_any_other_string():
    """Through the other's encoding, and back: the student cuts "redoes" to "redo", and the teacher cuts that,
    behind its blank, to " red"."""
    teacher = vocabulary(b" ", b"r", b"e", b"d", b" r", b" re", b" red", b" redoes", b"redo")
    student = vocabulary(b"r", b"e", b"d", b"o", b"re", b"red", b"redo")
    led = VocabularyPair.of(teacher, student, "cells").cells_after(Lead("teacher", b" "))
    r, re, red = range(3)
    assert led.teacher.tolist() == [-1, -1, -1, -1, r, re, red, red, -1]
    assert led.student.tolist() == [r, -1, -1, -1, re, red, red]
    exact = VocabularyPair.of(teacher, student, "exact").cells_after(Lead("teacher", b" "))
    assert exact.teacher.tolist() == [-1, -1, -1, -1, r, re, red, -1, -1]
    assert exact.student.tolist() == [r, -1, -1, -1, re, red, -1]


def test_words_that_a_side_has_with_a_blank_alone_are_met_behind_it():
    """As many tokenizers have " yes" and no "yes": the cells of the middle of a text would put these answers
    together by what they begin with."""
    words = [b"yes", b"yellow", b"red", b"rectangle"]
    parts = [b"y", b"e", b"s", b"r", b" "]
    teacher = vocabulary(*parts, *words)
    student = vocabulary(*parts, *(b" " + word for word in words))
    pair = VocabularyPair.of(teacher, student, "cells")
    assert len({*pair.cells.teacher[-4:].tolist()}) == 2
    for kind in ("cells", "exact"):
        led = VocabularyPair.of(teacher, student, kind).cells_after(Lead("student", b" "))
        assert len({*led.teacher[-4:].tolist()} - {-1}) == 4
        assert led.teacher[-4:].tolist() == led.student[-4:].tolist()


def test_exact_strings_alone():
    teacher, student = [b"re", b"d", b"s", "<end>"], [b"re", b"ds", "<end>"]
    _, rows, _ = aligned(teacher, student, kind="exact")
    assert rows == {PLAIN: [(0, 0), (3, 2)]}


def test_an_id_that_the_vocabulary_lacks_is_refused():
    pair = pair_of([b"a"], [b"a"])
    with pytest.raises(CachekdError, match="token that its vocabulary lacks"):
        pair.aligned([7], [1])
    with pytest.raises(CachekdError, match="token that its vocabulary lacks"):
        pair.aligned([1], [-1])
