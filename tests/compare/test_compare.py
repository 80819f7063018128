"""What is gathered of a pipeline's points, and what tables and sentences make of it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from functools import partial
from statistics import mean, stdev

import numpy as np
import pytest
import yaml

from cachekd.compare import Comparison, compare, gather
from cachekd.compare.pages import csv_table
from cachekd.compare.results import Difference
from cachekd.compare.words import difference_text, interval_text, notes, sentence, table_of_means
from cachekd.errors import CachekdError
from cachekd.evaluate import CellCoverage
from cachekd.evaluate.scores import paired_intervals
from cachekd.pipeline import read_pipeline
from cachekd.pipeline.vary import Sweep, expand
from cachekd.train.cost import Cost
from sweeps import QUESTIONS, RIGHT, filled, finish, score, states, sweep_of, write_pipeline


@pytest.fixture
def make(tmp_path) -> Callable[..., Sweep]:
    return partial(sweep_of, tmp_path)


def row(comparison: Comparison, label: str):
    return next(row for row in comparison.sections[0].rows if row.label == label)


# ---- what is computed


def test_means_and_differences_are_those_of_the_scores(make):
    sweep = make()
    found = compare(gather(sweep, filled(sweep)))
    [section] = found.sections
    assert (found.axis, found.baseline, found.unit) == ("method", "ce", "points")
    assert {one.label for one in section.rows} == {", ".join(key) for key in RIGHT}
    for key, right in RIGHT.items():
        shares = [one / QUESTIONS for one in right]
        of_row = row(found, ", ".join(key))
        assert of_row.metrics["exact_match"].mean == pytest.approx(mean(shares))
        assert of_row.metrics["exact_match"].standard_error == pytest.approx(stdev(shares) / math.sqrt(3))
        assert of_row.seeds == [0, 1, 2]
    assert len(section.differences) == 2
    for one in section.differences:
        limit = one.variant["student.limit"]
        gained = [
            100 * (ours - theirs) / QUESTIONS
            for ours, theirs in zip(RIGHT["align", limit], RIGHT["ce", limit], strict=True)
        ]
        half = 4.302652729911275 * stdev(gained) / math.sqrt(3)  # t of 2 degrees, from a table
        assert one.difference == pytest.approx(mean(gained))
        assert (one.low, one.high) == pytest.approx((mean(gained) - half, mean(gained) + half))
        assert (one.over, one.seeds, one.of_seeds) == ("seeds", [0, 1, 2], 3)
    assert {name: one.exact_match for name, one in section.references.items()} == {
        "teacher": 0.98,
        "prior": 0.4,
    }


@pytest.mark.parametrize(
    ("unit", "difference", "half", "said"),
    [
        ("nats", 0.0321, 0.0123, "+0.0321 ± 0.0123 nats"),
        ("nats", 0.0000321, 0.0000123, "+0.00003 ± 0.00001 nats"),
        ("points", 1.25, 0.25, "+1.2 ± 0.2 points"),
        ("points", 0.012, 0.004, "+0.012 ± 0.004 points"),
    ],
)
def test_what_is_not_0_is_not_written_as_0(unit, difference, half, said):
    one = Difference(
        variant={"method": "align"},
        against="ce",
        difference=difference,
        standard_error=half / 2,
        low=difference - half,
        high=difference + half,
        over="seeds",
        seeds=[0, 1, 2],
        of_seeds=3,
    )
    assert said in sentence(one, unit)
    assert float(difference_text(one, unit)) != 0
    assert all(float(bound) > 0 for bound in interval_text(one, unit).split(" to "))


def test_no_difference_with_one_seed_is_said_as_such(make):
    sweep = make(seeds=[7])
    found = compare(gather(sweep, filled(sweep, {key: {7: 200} for key in RIGHT})))
    said = [sentence(one, "points") for one in found.sections[0].differences]
    assert said[0] == "align, limit=250: the same as ce with one seed"


def test_the_words_say_what_the_intervals_say(make):
    sweep = make()
    found = compare(gather(sweep, filled(sweep)))
    said = [sentence(one, "points") for one in found.sections[0].differences]
    assert said == [
        "align, limit=250: +1.2 ± 0.6 points over ce, 3 seeds",
        "align, limit=1000: no difference seen from ce (+0.1 ± 6.2 points, 3 seeds)",
    ]
    many = next(note for note in notes(found) if "Of twenty such intervals" in note)
    intervals = [
        one for one in found.sections[0].differences + found.sections[0].by_type if one.low is not None
    ]
    assert many.startswith(f"{len(intervals):,} differences")


def test_by_question_type(make):
    sweep = make()
    [section] = compare(gather(sweep, filled(sweep))).sections
    assert {(one.type, one.variant["student.limit"]) for one in section.by_type} == {
        (kind, limit) for kind in ("what is", "is there") for limit in ("limit=250", "limit=1000")
    }
    for one in section.by_type:
        of_type = {
            method: [
                row_of.by_type[one.type].mean
                for row_of in section.rows
                if row_of.variant == one.variant | {"method": method}
            ]
            for method in ("ce", "align")
        }
        assert one.difference == pytest.approx(100 * (of_type["align"][0] - of_type["ce"][0]))


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("align", {("ce", "limit=250"), ("ce", "limit=1000")}),
        ("limit=1000", {("ce", "limit=250"), ("align", "limit=250")}),
    ],
)
def test_any_value_of_any_axis_can_be_the_baseline(make, baseline, expected):
    sweep = make(baseline="align")
    found = compare(gather(sweep, filled(sweep)), baseline=None if baseline == "align" else baseline)
    assert {tuple(one.variant.values()) for one in found.sections[0].differences} == expected
    assert {one.against for one in found.sections[0].differences} == {baseline}


def test_another_metric(make):
    sweep = make()
    known = states(sweep)
    for point in sweep.points:
        right = RIGHT[tuple(point.variant.values())][point.seed]
        others = {
            "top1_agreement": 0.9,
            "kl": right / 1000,
            "agrees_with": "t",
            "blind": score("b", right // 2),
        }
        finish(point, right, **others)
    gathered = gather(sweep, known)
    kl = compare(gathered, metric="kl")
    assert kl.unit == "nats"
    assert kl.sections[0].differences[0].difference == pytest.approx((4 + 6 + 5) / 3 / 1000)
    assert not kl.sections[0].by_type
    blind = compare(gathered, metric="blind")
    assert blind.sections[0].differences[0].difference == pytest.approx(100 * (2 + 3 + 2) / 3 / QUESTIONS)
    equal = compare(gathered, metric="top1_agreement").sections[0].differences[0]
    assert sentence(equal, "points") == "align, limit=250: the same as ce with each of 3 seeds"


def test_that_the_baseline_is_not_finished_is_said(make):
    sweep = make()
    known = states(sweep, **{f"{one.name} student": "waiting" for one in sweep.points if "ce" in one.name})
    filled(sweep)
    found = compare(gather(sweep, known))
    assert not found.sections[0].differences
    assert notes(found)[0] == "Nothing is compared: no run with the baseline, ce, is finished."
    assert "Nothing is compared" not in "".join(notes(compare(gather(sweep, states(sweep)))))


def test_a_metric_that_some_lack_is_in_no_mean(make):
    sweep = make()
    known = filled(sweep, top1_agreement=0.9, kl=0.1, agrees_with="t")
    finish(sweep.points[0], 200)
    found = compare(gather(sweep, known), metric="kl")
    first, *others = found.sections[0].rows
    assert "kl" not in first.metrics
    assert all("kl" in one.metrics for one in others)
    assert [one.variant["student.limit"] for one in found.sections[0].differences] == ["limit=1000"]


def test_a_metric_that_none_has_is_refused(make):
    sweep = make()
    with pytest.raises(CachekdError, match="no evaluation has KL") as caught:
        compare(gather(sweep, filled(sweep)), metric="kl")
    assert "`teacher` or `cache`" in caught.value.fix


# ---- cost


def test_cost_stands_beside_the_scores(make):
    sweep = make()
    known = states(sweep)
    for point in sweep.points:
        flops = 1e12 * (1 + point.seed)
        cost = Cost(steps=10, seconds=2.0 + point.seed, tokens=5, flops=flops, peak_bytes=2 * 10**6)
        finish(point, RIGHT[tuple(point.variant.values())][point.seed], cost=cost)
    of_row = row(compare(gather(sweep, known)), "ce, limit=250")
    assert {name: one.mean for name, one in of_row.cost.items()} == {
        "steps": 10,
        "seconds": 3.0,
        "flops": 2e12,
        "peak_bytes": 2e6,
    }


def test_runs_of_an_earlier_version_have_no_cost_and_all_else(make):
    sweep = make()
    found = compare(gather(sweep, filled(sweep)))
    assert [one.cost for one in found.sections[0].rows] == [{}] * 4


# ---- what is not there


def test_what_is_not_done_is_named_and_in_no_table(make):
    sweep = make()
    filled(sweep)
    known = states(
        sweep,
        **{
            "ce,limit=250/seed-0 student": "changed: epochs 1 -> 2",
            "ce,limit=250/seed-0 test": "changed: step student is to be redone",
            "align,limit=1000/seed-2 test": "failed: out of memory",
        },
    )
    found = compare(gather(sweep, known))
    assert [(one.point, one.why) for one in found.left_out] == [
        ("ce,limit=250/seed-0", "step student, changed: epochs 1 -> 2"),
        ("align,limit=1000/seed-2", "step test, failed: out of memory"),
    ]
    assert row(found, "ce, limit=250").seeds == [1, 2]
    assert row(found, "align, limit=250").seeds == [0, 1, 2]
    one, other = found.sections[0].differences
    assert (one.seeds, other.seeds) == ([1, 2], [0, 1])  # of both
    assert sentence(one, "points").endswith("2 of 3 seeds)")


def test_nothing_to_compare_yet(make):
    sweep = make()
    known = states(sweep, **{f"{point.name} student": "waiting" for point in sweep.points})
    with pytest.raises(CachekdError, match="nothing to compare yet") as caught:
        gather(sweep, known)
    assert "ce,limit=250/seed-0: step student, waiting" in str(caught.value)


def test_scores_on_other_questions_are_never_compared(make):
    sweep = make()
    known = filled(sweep)
    for point in sweep.points:
        if point.variant["method"] == "align":
            finish(point, 100, fingerprint="b" * 64)
    found = compare(gather(sweep, known))
    assert [len(section.rows) for section in found.sections] == [2, 2]
    assert [section.differences for section in found.sections] == [[], []]
    assert any("2 different sets of questions" in note for note in notes(found))


def test_a_value_that_is_none(make):
    sweep = make()
    gathered = gather(sweep, filled(sweep))
    with pytest.raises(CachekdError, match="no axis has such a value"):
        compare(gathered, baseline="")  # as of a variable of the shell that is not set
    with pytest.raises(CachekdError, match="no axis has such a value") as caught:
        compare(gathered, baseline="alig")
    assert caught.value.fix == "did you mean align?"


def test_a_pipeline_whose_student_nobody_asks(tmp_path):
    path = write_pipeline(tmp_path, "data", ("teacher", "model"), seeds=2)
    said = yaml.safe_load(path.read_text())
    said["steps"].pop()
    path.write_text(yaml.safe_dump(said))
    with pytest.raises(CachekdError, match="nobody asks the student"):
        gather(expand(read_pipeline(path)), {})


# ---- one seed, or none


def test_one_seed_falls_back_to_the_tests_samples_and_says_so(make):
    sweep = make(seeds=[7])
    right = {key: {7: values[0]} for key, values in RIGHT.items()}
    found = compare(gather(sweep, filled(sweep, right)))
    small, large = found.sections[0].differences
    for one, right in ((small, (204, 200)), (large, (310, 300))):
        rows = np.stack([score("", n).right for n in right])
        [expected] = paired_intervals(rows, [(0, 1)], [2] * (QUESTIONS // 2))
        assert (one.low, one.high) == pytest.approx((100 * expected.low, 100 * expected.high))
        assert (one.over, one.standard_error) == ("samples", None)
    said = sentence(large, "points")
    assert said.startswith("align, limit=1000: +2.5 points over ce with one seed (+")
    assert sentence(small, "points").startswith(
        "align, limit=250: +1.0 points over ce with one seed: no difference seen (+0.0 to +"
    )
    assert "over the test's samples; another seed may say otherwise" in said
    assert any("With one seed" in note for note in notes(found))
    assert all(each.low is None for each in found.sections[0].by_type)


def test_seeds_without_axes_are_summed_up(make):
    sweep = make(vary={})
    known = states(sweep)
    for point in sweep.points:
        finish(point, 200 + point.seed)
    found = compare(gather(sweep, known))
    assert found.baseline is None
    [of_all] = found.sections[0].rows
    assert of_all.metrics["exact_match"].mean == pytest.approx(201 / QUESTIONS)
    assert not found.sections[0].differences
    with pytest.raises(CachekdError, match="nothing varies but the seed"):
        compare(gather(sweep, known), baseline="ce")


def test_a_run_that_two_points_share_is_not_compared_with_itself(make):
    """A student of plain cross-entropy has no cache, whatever is in it."""
    methods = {"ce": {"student": {"lambda_align": 0}}, "align": {}}
    sweep = make(vary={"method": methods, "cache.top_k": [8, 16]})
    known = states(sweep)
    assert len({point.steps["student"].out for point in sweep.points}) < len(sweep.points)
    for point in sweep.points:
        finish(point, 200 + point.seed * (1 + len(point.variant["method"])))
    found = compare(gather(sweep, known), baseline="top_k=8")
    assert {one.variant["method"] for one in found.sections[0].differences} == {"align"}


def test_a_teacher_that_is_an_axis_stands_beside_its_students(make):
    """And KL to one teacher is not compared with KL to another."""
    sweep = make(vary={"teacher": {"small": {"cache": {"top_k": 8}}, "large": {"cache": {"top_k": 16}}}})
    known = states(sweep)
    for point in sweep.points:
        size = point.variant["teacher"]
        others = {"kl": 0.1 + point.seed, "top1_agreement": 0.5, "agrees_with": size}
        finish(point, 200 + point.seed * len(size), teacher=300 if size == "small" else 390, **others)
    gathered = gather(sweep, known)
    found = compare(gathered)
    [section] = found.sections
    assert section.references.keys() == {"prior"}
    assert [row_of.references["teacher"].mean for row_of in section.rows] == [0.75, 0.975]
    columns, rows = table_of_means(section)
    assert [(one[0], one[columns.index("teacher")]) for one in rows] == [
        ("small", "75.00 ± 0.00 %"),
        ("large", "97.50 ± 0.00 %"),
        ("prior", ""),
    ]
    assert len(section.differences) == 1
    assert compare(gathered, metric="kl").sections[0].differences == []
    assert any("own teacher" in note for note in notes(found))


def test_kl_over_cells_is_compared_within_one_tokenizer(make):
    """Of students with other tokenizers there is no difference, though they have one teacher."""
    sweep = make()
    known = states(sweep)
    tokenizers = {"limit=250": {"ce": None, "align": "b"}, "limit=1000": {"ce": "b", "align": "b"}}
    for point in sweep.points:
        method, limit = point.variant.values()
        of = tokenizers[limit][method]
        cells = None if of is None else CellCoverage(tokenizer=of, compared=90 + point.seed, tokens=100)
        finish(point, 200, kl=0.1 + point.seed, top1_agreement=0.5, agrees_with="t", over_cells=cells)
    gathered = gather(sweep, known)
    found = compare(gathered, metric="kl")
    assert [one.variant["student.limit"] for one in found.sections[0].differences] == ["limit=1000"]
    [said] = [note for note in notes(found) if "over cells" in note]
    assert said.startswith(
        "Agreement and KL of ce, limit=1000; align, limit=250; align, limit=1000 are over cells"
    )
    assert len(compare(gathered).sections[0].differences) == 2  # exact match is each model's own
    rows = list(csv.DictReader(io.StringIO(csv_table(gathered))))
    assert {row["over_cells"] for row in rows} == {"", "90", "91", "92"}
