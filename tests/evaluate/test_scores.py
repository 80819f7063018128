"""Differences between models are as sure as their interval says; a run's scores stay its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekd.cache.quantization import QuantizationInfo
from cachekd.data.left_out import LeftOutSamples
from cachekd.errors import CachekdError
from cachekd.evaluate import Evaluation, QuestionSet, Score, read_scores, save_in_runs
from cachekd.evaluate.scores import FEWEST_SAMPLES, RESAMPLES, paired_intervals
from cachekd.evaluate.scores_file import read_evaluation
from cachekd.paths import EVALUATIONS_FOLDER, RUN_FILE


def asked(fingerprint="a" * 64, per_sample=(1, 2, 1)):
    return QuestionSet(
        data="data/test",
        fingerprint=fingerprint,
        history="none",
        questions=sum(per_sample),
        per_sample=list(per_sample),
        types={"what is": sum(per_sample)},
        unasked_answers=0,
        left_out=LeftOutSamples(),
    )


def score(name, correct, **others):
    share = correct.count("1") / len(correct)
    return Score(name=name, exact_match=share, by_type={"what is": share}, correct=correct, **others)


def interval(ours, theirs, per_sample):
    [found] = paired_intervals(np.stack([ours, theirs]), [(0, 1)], per_sample)
    return found


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=4),
        min_size=FEWEST_SAMPLES,
        max_size=FEWEST_SAMPLES + 4,
    )
)
def test_the_interval_is_that_of_a_bootstrap_over_samples(answers):
    flat = [rows for sample in answers for rows in sample]
    right = np.array(flat).T
    pairs = [(0, 1), (2, 0)]
    random, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = [answers[index] for index in random.integers(len(answers), size=len(answers))]
        rows = [rows for sample in drawn for rows in sample]
        found.append([sum(int(r[i]) - int(r[j]) for r in rows) / len(rows) for i, j in pairs])
    expected = np.percentile(found, [2.5, 97.5], axis=0).T
    assert np.allclose(paired_intervals(right, pairs, [len(sample) for sample in answers]), expected)


def test_many_samples_are_drawn_a_few_times_at_a_time(monkeypatch):
    random = np.random.default_rng(3)
    right = random.random((2, 500)) < 0.5
    whole = paired_intervals(right, [(0, 1)], [1] * 500)
    monkeypatch.setattr("cachekd.evaluate.scores._AT_A_TIME", 500 * 7)
    assert paired_intervals(right, [(0, 1)], [1] * 500) == whole


def test_of_too_few_samples_nothing_is_sure():
    right = np.array([[True] * 9, [False] * 9])
    assert paired_intervals(right, [(0, 1)], [1] * 9) == [(None, None)]
    few = Evaluation(
        asked=asked(), dtype="float32", models=[score("a", "1111"), score("b", "0000")]
    ).compared()
    assert [d.sure for d in few.differences] == [False]


def test_answers_to_one_picture_are_not_taken_for_independent_ones():
    random = np.random.default_rng(1)
    by_sample = random.random((200, 2)) < (0.7, 0.6)
    ours, theirs = (np.repeat(side, 10) for side in by_sample.T)  # ten questions with one fate
    low, high = interval(ours, theirs, [10] * 200)
    naive_low, naive_high = interval(ours, theirs, [1] * 2000)
    assert 2.5 < (high - low) / (naive_high - naive_low) < 4  # the square root of ten


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    random, held = np.random.default_rng(2), 0
    for _ in range(200):
        ours, theirs = random.random(300) < 0.7, random.random(300) < 0.6
        low, high = interval(ours, theirs, [1] * 300)
        held += low <= 0.1 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_every_model_is_compared_with_the_others_the_teacher_itself_blind_and_the_prior():
    result = Evaluation(
        asked=asked(),
        dtype="float32",
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


def run_folder(path):
    path.mkdir()
    (path / RUN_FILE).write_text("{}")
    return path


def test_a_record_survives_those_of_other_questions_and_keeps_what_only_it_knows(tmp_path):
    run = run_folder(tmp_path / "run")
    agreement = {"top1_agreement": 0.5, "kl": 0.1, "agrees_with": "t"}
    whole = score(str(run), "1100", **agreement, blind=score(str(run), "0100"))
    nf4 = QuantizationInfo(backend="bitsandbytes", version="0.50.2", settings={"load_in_4bit": True})
    teacher = {"teacher": score("t", "1111"), "teacher_quantization": nf4}
    save_in_runs(Evaluation(asked=asked(), dtype="float32", **teacher, models=[whole]))
    save_in_runs(Evaluation(asked=asked("b" * 64), dtype="float32", models=[score(str(run), "0000")]))
    save_in_runs(
        Evaluation(
            asked=asked(), dtype="float32", models=[score(str(run), "1100"), score("not a run", "1111")]
        )
    )
    records = {record.asked.fingerprint[0]: record for record in read_scores(run)}
    assert records["b"].models[0].correct == "0000"
    assert records["b"].teacher_quantization is None
    assert (records["a"].teacher.name, records["a"].teacher_quantization) == ("t", nf4)
    [mine] = records["a"].models
    assert (mine.kl, mine.agrees_with, mine.blind.correct) == (0.1, "t", "0100")
    assert {d.against for d in records["a"].differences} == {"teacher t", f"{run}, blind"}


@pytest.mark.parametrize(("correct", "dtype"), [("1101", "float32"), ("1100", "bfloat16")])
def test_nothing_is_kept_beside_other_answers_or_arithmetic(tmp_path, correct, dtype):
    run = run_folder(tmp_path / "run")
    whole = score(str(run), "1100", kl=0.1, agrees_with="t", blind=score(str(run), "0100"))
    save_in_runs(Evaluation(asked=asked(), dtype="float32", teacher=score("t", "1111"), models=[whole]))
    save_in_runs(Evaluation(asked=asked(), dtype=dtype, models=[score(str(run), correct)]))
    [record] = read_scores(run)
    assert (record.teacher, record.models[0].kl, record.models[0].blind) == (None, None, None)
    assert record.teacher_quantization is None


def test_agreement_with_one_teacher_does_not_stand_beside_another(tmp_path):
    run = run_folder(tmp_path / "run")
    save_in_runs(
        Evaluation(
            asked=asked(), dtype="float32", teacher=score("t", "1111"), models=[score(str(run), "1100")]
        )
    )
    by_cache = score(str(run), "1100", top1_agreement=0.5, kl=0.1, agrees_with="u")
    save_in_runs(Evaluation(asked=asked(), dtype="float32", models=[by_cache]))
    [record] = read_scores(run)
    assert (record.teacher, record.models[0].agrees_with) == (None, "u")


def test_records_come_newest_first_wherever_they_were_copied(tmp_path):
    run = run_folder(tmp_path / "run")
    for letter, at in (("b", "2026-01-02"), ("c", "2026-01-03"), ("a", "2026-01-01")):
        save_in_runs(Evaluation(asked=asked(letter * 64), dtype="float32", models=[score(str(run), "1100")]))
        [file] = (run / EVALUATIONS_FOLDER).glob(f"{letter}*")
        file.write_text(read_evaluation(file).model_copy(update={"at": at}).model_dump_json())
    assert [record.asked.fingerprint[0] for record in read_scores(run)] == ["c", "b", "a"]


def test_a_run_that_cannot_be_written_is_said(tmp_path):
    run = run_folder(tmp_path / "run")
    (run / EVALUATIONS_FOLDER).write_text("")
    with pytest.raises(CachekdError, match="cannot be written"):
        save_in_runs(Evaluation(asked=asked(), dtype="float32", models=[score(str(run), "1100")]))


def test_a_broken_record_is_named(tmp_path):
    run = run_folder(tmp_path / "run")
    save_in_runs(Evaluation(asked=asked(), dtype="float32", models=[score(str(run), "1100")]))
    [file] = (run / EVALUATIONS_FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CachekdError, match=file.name):
        read_scores(run)


def test_a_summary_has_no_answers_to_single_questions():
    one = score("a", "1100", blind=score("a", "1000"))
    summary = Evaluation(asked=asked(), dtype="float32", teacher=one, models=[one], prior=one).summary()
    assert "correct" not in repr(summary)
    assert summary["models"][0]["blind"]["exact_match"] == 0.25
