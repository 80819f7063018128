"""Differences between models are as sure as their interval says; a run's scores stay its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.errors import CachekdError
from cachekd.evaluation import Evaluation, QuestionSet, Score, read_records, save_in_runs
from cachekd.evaluation.bootstrap import RESAMPLES, paired_interval
from cachekd.files import EVALUATIONS_FOLDER, RUN_FILE


def asked(fingerprint="a" * 64, per_sample=(1, 2, 1)):
    return QuestionSet(
        data="data/test",
        fingerprint=fingerprint,
        history="none",
        questions=sum(per_sample),
        per_sample=list(per_sample),
        types={"what is": sum(per_sample)},
    )


def score(name, correct, **others):
    share = correct.count("1") / len(correct)
    return Score(name=name, exact_match=share, by_type={"what is": share}, correct=correct, **others)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4), min_size=1, max_size=8
    )
)
def test_the_interval_is_that_of_a_bootstrap_over_samples(answers):
    flat = [pair for sample in answers for pair in sample]
    ours, theirs = (np.array(side) for side in zip(*flat, strict=True))
    random, differences = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = [answers[index] for index in random.integers(len(answers), size=len(answers))]
        pairs = [pair for sample in drawn for pair in sample]
        differences.append(sum(int(a) - int(b) for a, b in pairs) / len(pairs))
    low, high = paired_interval(ours, theirs, [len(sample) for sample in answers])
    assert (low, high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))


def test_answers_to_one_picture_are_not_taken_for_independent_ones():
    random = np.random.default_rng(1)
    by_sample = random.random((200, 2)) < (0.7, 0.6)
    ours, theirs = (np.repeat(side, 10) for side in by_sample.T)  # ten questions with one fate
    low, high = paired_interval(ours, theirs, [10] * 200)
    naive_low, naive_high = paired_interval(ours, theirs, [1] * 2000)
    assert 2.5 < (high - low) / (naive_high - naive_low) < 4  # the square root of ten


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    random, held = np.random.default_rng(2), 0
    for _ in range(200):
        ours, theirs = random.random(300) < 0.7, random.random(300) < 0.6
        low, high = paired_interval(ours, theirs, [1] * 300)
        held += low <= 0.1 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_every_model_is_compared_with_the_others_the_teacher_itself_blind_and_the_prior():
    result = Evaluation(
        asked=asked(),
        teacher=score("t", "1111"),
        models=[score("a", "1100", blind=score("a", "1000")), score("b", "0111")],
        prior=score("train", "0000"),
    ).compared()
    found = {(d.row, d.against): d.difference for d in result.differences}
    assert found == pytest.approx(
        {
            ("a", "teacher t"): -0.5,
            ("a", "a, blind"): 0.25,
            ("a", "prior"): 0.5,
            ("b", "a"): 0.25,
            ("b", "teacher t"): -0.25,
            ("b", "prior"): 0.75,
        }
    )
    assert all(d.low <= d.difference <= d.high for d in result.differences)


def run_folder(path):
    path.mkdir()
    (path / RUN_FILE).write_text("{}")
    return path


def test_a_record_survives_those_of_other_questions_and_keeps_what_only_it_knows(tmp_path):
    run = run_folder(tmp_path / "run")
    whole = score(str(run), "1100", top1_agreement=0.5, kl=0.1, blind=score(str(run), "0100"))
    save_in_runs(Evaluation(asked=asked(), teacher=score("t", "1111"), models=[whole]))
    save_in_runs(Evaluation(asked=asked("b" * 64), models=[score(str(run), "0000")]))
    save_in_runs(Evaluation(asked=asked(), models=[score(str(run), "1101"), score("not a run", "1111")]))
    newest, other = read_records(run)
    assert newest.asked.fingerprint == "a" * 64
    assert other.models[0].correct == "0000"
    assert newest.teacher.name == "t"
    [mine] = newest.models
    assert (mine.correct, mine.kl, mine.blind.correct) == ("1101", 0.1, "0100")
    assert {d.against for d in newest.differences} == {"teacher t", f"{run}, blind"}


def test_a_broken_record_is_named(tmp_path):
    run = run_folder(tmp_path / "run")
    save_in_runs(Evaluation(asked=asked(), models=[score(str(run), "1100")]))
    [file] = (run / EVALUATIONS_FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CachekdError, match=file.name):
        read_records(run)


def test_a_summary_has_no_answers_to_single_questions():
    one = score("a", "1100", blind=score("a", "1000"))
    summary = Evaluation(asked=asked(), teacher=one, models=[one], prior=one).summary()
    assert "correct" not in repr(summary)
    assert summary["models"][0]["blind"]["exact_match"] == 0.25
