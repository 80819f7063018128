"""Scores on public benchmarks: what runs keep of them, tables, the report, the paper's figures."""

from __future__ import annotations

import json
import re
import tomllib

import numpy as np
import pytest

from cachekd.config import EvalConfig, read_config
from cachekd.data.left_out import LeftOutSamples
from cachekd.errors import CachekdError
from cachekd.evaluate import read_scores
from cachekd.lmms.environment import LMMS_EVAL
from cachekd.lmms.harness import standard_error
from cachekd.lmms.scores import (
    Benchmark,
    BenchmarkScores,
    Metric,
    ModelScores,
    benchmark_path,
    read_benchmarks,
    require_kept_scores,
    save_in_runs,
)
from cachekd.lmms.suite import AVERAGES, SUITES, average, tasks_of
from cachekd.paths import EVALUATIONS_FOLDER, RUN_FILE
from cachekd.pipeline import plan_steps, read_pipeline
from cachekd.report.benchmarks import benchmark_table
from cachekd.report.runs import Run
from cachekd_cli import benchmarks as shown
from caches import ROOT

ASKED = "2026-11-28T03:34:38+00:00"


def benchmark(name="pope", value=0.5, questions=9000, of=9000, **others):
    metrics = [
        Metric(name="pope_accuracy", value=value, stderr=0.005),
        Metric(name="pope_f1_score", value=value / 2),
    ]
    return Benchmark(
        **{"name": name, "version": "0.0", "data": "org/pope", "metrics": metrics}
        | {"questions": questions, "of": of, "unanswered": LeftOutSamples()}
        | others
    )


def scores(*models, limit=None, **others):
    versions = {"lmms-eval": LMMS_EVAL, "cachekd": "0", "torch": "2", "transformers": "5"}
    return BenchmarkScores(
        at=ASKED, dtype="float32", limit=limit, versions=versions, models=list(models), **others
    )


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / RUN_FILE).write_text("{}")
    return folder


# ---- what is kept


def test_a_run_keeps_each_benchmark_and_a_trial_takes_nothing_away(run):
    own = ModelScores(name=str(run), benchmarks=[benchmark(), benchmark("gqa", 0.25)])
    teacher = ModelScores(name="t", benchmarks=[benchmark(value=0.9), benchmark("gqa", 0.8)])
    save_in_runs(scores(own, ModelScores(name="no run", benchmarks=[benchmark()]), teacher=teacher))
    trial = ModelScores(name=str(run), benchmarks=[benchmark(value=1.0, questions=10)])
    save_in_runs(scores(trial, limit=10))
    kept = {(one.models[0].benchmarks[0].name, one.limit): one for one in read_benchmarks(run)}
    assert kept.keys() == {("pope", None), ("gqa", None), ("pope", 10)}
    assert [one.name for one in kept["gqa", None].teacher.benchmarks] == ["gqa"]
    assert kept["pope", None].models[0].benchmarks[0].metrics[0].value == 0.5
    assert kept["pope", 10].models[0].benchmarks[0].metrics[0].value == 1.0
    assert all(one.at == ASKED and one.versions["lmms-eval"] == LMMS_EVAL for one in kept.values())
    assert read_scores(run) == []  # they are none of cachekd's own questions
    again = ModelScores(name=str(run), benchmarks=[benchmark(value=0.75)])
    save_in_runs(scores(again))
    values = {one.limit: one.models[0].benchmarks[0].metrics[0].value for one in read_benchmarks(run)[1:]}
    assert values == {None: 0.75, 10: 1.0}


@pytest.mark.parametrize("name", ["mine/of today", "../../../mine"])
def test_a_name_with_a_slash_is_no_folder(run, name):
    save_in_runs(scores(ModelScores(name=str(run), benchmarks=[benchmark(name)])))
    [kept] = read_benchmarks(run)
    assert kept.models[0].benchmarks[0].name == name
    assert not list(run.parent.glob("*.json"))


def test_a_metric_that_is_no_number_can_be_read_again(run):
    save_in_runs(scores(ModelScores(name=str(run), benchmarks=[benchmark(value=float("nan"))])))
    [kept] = read_benchmarks(run)
    assert np.isnan(kept.models[0].benchmarks[0].metrics[0].value)
    require_kept_scores([str(run)])


@pytest.mark.parametrize("content", ["{", "{}", None])
def test_scores_that_cannot_be_kept_or_read_are_known_first(run, content):
    path = benchmark_path(run, "pope", None)
    if content is None:
        (run / EVALUATIONS_FOLDER).write_text("")
    else:
        path.parent.mkdir(parents=True)
        path.write_text(content)
    with pytest.raises(CachekdError):
        require_kept_scores([str(run)])


def test_a_standard_error_is_that_of_a_mean_or_none():
    random = np.random.default_rng(0)
    right = (random.random(400) < 0.7).astype(float)
    expected = right.std(ddof=1) / np.sqrt(len(right))
    as_tasks_have_it = [{"question_id": n, "score": value} for n, value in enumerate(right)]
    for values in (list(right), [bool(value) for value in right], as_tasks_have_it):
        assert standard_error(values, right.mean()) == pytest.approx(expected)
    assert standard_error(list(right), right.mean() + 0.01) is None  # F1, say
    assert standard_error([{"index": 1}, {"index": 2}], 0.5) is None
    assert standard_error([None, None], 0.5) is None
    assert standard_error([1.0], 1.0) is None


# ---- what is shown


def test_the_table_has_values_errors_and_how_many_were_asked(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(shown.console, "_width", 200)
    unanswered = LeftOutSamples(1, {"pope/7": "the sample is too long"})
    trial = benchmark(questions=100, unanswered=unanswered)
    shown.print_benchmarks(
        scores(ModelScores(name="runs/kd", benchmarks=[trial]), ModelScores(name="runs/ce", benchmarks=[]))
    )
    told = capsys.readouterr().out
    row = re.search(r"pope\W+pope_accuracy\W+(.*)", told)[0]
    assert "100 of 9,000" in row
    assert "0.5 ± 0.005" in row
    assert "pope/7: the sample is too long" in told
    assert "count as wrong" in told
    assert "switch-kd" not in told  # which nobody asked for


def whole_suite(share):
    """A model with the same percentage on all ten."""
    made = [
        benchmark(line.task, metrics=[Metric(name=line.metric, value=share / line.scale)])
        for line in SUITES["switch-kd"]
    ]
    return ModelScores(name="runs/kd", benchmarks=made)


def test_the_suite_has_the_papers_ten_and_its_averages(capsys, monkeypatch):
    lines = SUITES["switch-kd"]
    assert len(lines) == len({line.task for line in lines}) == 10
    for published, columns in zip(
        AVERAGES["switch-kd"], zip(*(x.published for x in lines), strict=True), strict=True
    ):
        assert sum(columns) / 10 == pytest.approx(published, abs=0.051)
    assert tasks_of("switch-kd") == tuple(line.task for line in lines)
    assert average("switch-kd", whole_suite(62.5)) == pytest.approx(62.5)
    part = whole_suite(62.5)
    assert average("switch-kd", ModelScores(name="x", benchmarks=part.benchmarks[1:])) is None
    monkeypatch.setattr(shown.console, "_width", 200)
    shown.print_benchmarks(scores(whole_suite(62.5), suite="switch-kd"))
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if "average" in line)
    assert re.findall(r"[\d.]+", row) == ["62.5", "56.5", "58.9", "60.1"]
    assert "of the first" not in told
    shown.print_benchmarks(scores(part, suite="switch-kd", limit=10))
    assert "yours of the first 10" in capsys.readouterr().out


def test_the_report_puts_runs_beside_each_other(run, tmp_path):
    def read(name, *found):
        return Run(tmp_path / name, name, {}, [], list(found))

    own = ModelScores(name="kd", benchmarks=[benchmark()])
    teacher = ModelScores(name="t", benchmarks=[benchmark(value=0.9)])
    trial = ModelScores(name="ce", benchmarks=[benchmark(value=0.1, questions=10)])
    kd = read("kd", scores(own, teacher=teacher))
    ce = read(
        "ce", scores(trial, limit=10), scores(ModelScores(name="ce", benchmarks=[benchmark(value=0.4)]))
    )
    table = benchmark_table([kd, ce])
    assert table.columns == ["kd", "ce", "teacher"]
    assert table.lines[0].values == ["0.5 ± 0.005", "0.4 ± 0.005", "0.9 ± 0.005"]
    assert table.lines[1].values == ["0.25", "0.2", "0.45"]
    assert table.lines[0].questions == "9,000"
    only_trial = benchmark_table([read("ce", scores(trial, limit=10)), kd])
    assert only_trial.lines[0].values == ["0.1 ± 0.005", ""]  # others are not of the same questions
    assert only_trial.lines[0].questions == "10, the first of 9,000"
    assert benchmark_table([read("none"), kd]) is None
    other = scores(own).model_copy(update={"dtype": "bfloat16"})
    notes = " ".join(benchmark_table([kd, read("x", other)]).notes)
    assert "dtype: bfloat16, float32: scores of different ones are mixed" in notes


# ---- settings


def test_data_and_benchmarks_do_not_go_together():
    with pytest.raises(CachekdError, match=r"'data': field required, or benchmarks(.|\n)*give --data"):
        read_config(None, EvalConfig, {"models": ["m"]})
    for setting, value in {"data": "d", "history": "full", "blind": False, "key": "k", "cache": "c"}.items():
        with pytest.raises(CachekdError, match=f"{setting}: not for public benchmarks"):
            read_config(None, EvalConfig, {"models": ["m"], "benchmarks": "pope", setting: value})
    for setting, value in {"tasks_dir": "t", "benchmark_data": ["pope=x"]}.items():
        with pytest.raises(CachekdError, match=f"{setting}: not for data of your own"):
            read_config(None, EvalConfig, {"models": ["m"], "data": "d", setting: value})
    asked = read_config(None, EvalConfig, {"models": ["m"], "benchmarks": "pope, gqa", "limit": 3})
    assert asked.benchmarks == ("pope", "gqa")
    assert EvalConfig(models=["m"], suite="switch-kd").asks_benchmarks
    with pytest.raises(CachekdError, match="a name and a folder are needed"):
        read_config(None, EvalConfig, {"models": ["m"], "benchmarks": "pope", "benchmark_data": ["pope"]})


def test_a_step_of_a_pipeline_that_asks_benchmarks_inherits_no_data(tmp_path):
    file, tasks = tmp_path / "pipeline.yaml", tmp_path / "tasks"
    (tasks / "__pycache__").mkdir(parents=True)
    for name in ("mine.yaml", "__pycache__/utils.pyc"):
        (tasks / name).write_text("")
    defaults = {"teacher": "t", "student": "s", "data": "d", "key": "k", "max_tokens": 99, "limit": 5}
    steps = [
        {"step": "train", "name": "ce", "lambda_align": 0, "lambda_vsd": 0},
        {"step": "eval", "name": "own", "data": "test"},
        {"step": "eval", "name": "public", "benchmarks": "pope", "tasks_dir": str(tasks)},
    ]
    file.write_text(json.dumps({"out": str(tmp_path / "out"), "defaults": defaults, "steps": steps}))
    _, own, public = plan_steps(read_pipeline(file))
    assert own.config.prior_data.data == "d"
    assert own.data.keys() == {"data", "prior_data"}
    assert public.config.models == own.config.models
    assert (public.config.data, public.config.prior_data, public.config.key) == (None, None, None)
    assert (public.config.teacher, public.config.max_tokens, public.config.limit) == ("t", 99, None)
    assert public.data == {}
    assert public.upstream == ("ce",)
    assert public.files == (tasks / "mine.yaml",)  # changed ones are asked anew


def test_a_step_reads_the_data_of_its_benchmarks_by_their_content(tmp_path):
    """What `datasets` saved says in JSON what it is; of Parquet and pictures only the bytes do."""
    saved, plain = tmp_path / "saved", tmp_path / "plain"
    for folder, names in (
        (saved, ("dataset_dict.json", "test/state.json", "test/data.arrow")),
        (plain, ("a.parquet",)),
    ):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
    steps = [
        {
            "step": "eval",
            "name": "public",
            "models": ["m"],
            "benchmarks": "pope,gqa",
            "benchmark_data": [f"pope={saved}", f"gqa={plain}"],
        }
    ]
    file = tmp_path / "pipeline.yaml"
    file.write_text(json.dumps({"out": str(tmp_path / "out"), "steps": steps}))
    [step] = plan_steps(read_pipeline(file))
    assert step.files == (saved / "dataset_dict.json", saved / "test/state.json", plain / "a.parquet")


def test_a_step_that_was_finished_before_there_were_benchmarks_stays_so():
    then = EvalConfig(models=["m"], data="d").deciding()
    now = dict(then)
    for name in ("benchmarks", "suite", "tasks_dir", "benchmark_data"):
        del then[name]
    assert EvalConfig.comparable(then) == EvalConfig.comparable(now)


def test_the_version_is_pinned_once_more_where_pip_reads_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["benchmarks"] == [f"lmms-eval=={LMMS_EVAL}"]
    assert project["entry-points"]["lmms_eval.models"] == {"cachekd": "cachekd.lmms:manifest"}
