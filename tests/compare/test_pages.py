"""A comparison on the terminal and on the disk."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cachekd.compare import Comparison, compare, gather, write_comparison
from cachekd.compare.pages import FILES, csv_table, page
from cachekd.compare.plots import curve_of, differences_along, number_in
from cachekd.compare.words import table_of_means
from cachekd.errors import CachekdError
from cachekd.train.cost import Cost
from cachekd_cli.console import table
from cachekd_cli.main import app
from pages import Page
from sweeps import RIGHT, filled, finish, score, states, sweep_of, write_pipeline


@pytest.fixture
def gathered(tmp_path):
    sweep = sweep_of(tmp_path)
    known = states(sweep, **{"align,limit=1000/seed-2 test": "failed: <b>out of memory</b>"})
    for point in sweep.points:
        method, limit = point.variant.values()
        flops = 1e12 * float(limit.partition("=")[2]) * (3 if method == "align" else 1)
        cost = Cost(steps=10, seconds=2.0, tokens=5, flops=flops, peak_bytes=2 * 10**6)
        right = RIGHT[method, limit][point.seed]
        finish(point, right, cost=cost, blind=score("", 150), top1_agreement=0.9, kl=0.25)
    return gather(sweep, known)


# ---- the page


def test_the_page_stands_alone(gathered):
    found = Page(page(compare(gathered)))
    assert found.fetched == []
    assert "<script" not in found.html


def test_the_page_says_what_the_scores_say(gathered):
    comparison = compare(gathered)
    found = Page(page(comparison))
    assert "align, limit=250: +1.2 ± 0.6 points over ce, 3 seeds." in found.text
    [of_row] = [one for one in comparison.sections[0].rows if one.label == "ce, limit=250"]
    share = of_row.metrics["exact_match"]
    error = 100 * share.standard_error
    told = [f"{100 * mean(RIGHT['ce', 'limit=250']) / 400:.2f} ± {error:.2f} %", "37.50 ± 0.00 %"]
    told += ["90.00 ± 0.00 %", "0.2500 ± 0.0000"]
    assert found.row("ce, limit=250") == ["ce, limit=250", "3", *told, "10", "2.0", "250", "2"]
    assert found.row("variant")[1:4] == ["seeds", "exact match", "exact match, blind"]
    assert found.row("teacher")[2] == "98.00 %"
    assert found.row("prior")[2] == "40.00 %"
    assert "differences have an interval here" in found.text
    assert "After ± in a sentence stands half the width" in found.text


def test_what_is_left_out_is_on_the_page_and_text_of_others_is_escaped(gathered):
    found = Page(page(compare(gathered)))
    assert found.row("align,limit=1000/seed-2")[1] == "step test, failed: <b>out of memory</b>"
    assert "<b>out of" not in found.html


def test_learning_curves_have_a_line_for_each_method(gathered):
    comparison = compare(gathered)
    found = Page(page(comparison))
    drawn = found.plot("exact match over student.limit")
    assert [label for label in ("ce", "align") if f">{label}</text>" in drawn] == ["ce", "align"]
    assert re.findall(r">(250|1,000|1000)</text>", drawn)
    [section] = comparison.sections
    curve = curve_of(section.rows, "student.limit", "exact_match")
    assert list(curve) == ["ce", "align"]
    assert [spot.x for spot in curve["ce"]] == [250, 1000]
    [first, _] = curve["align"]
    share = next(row for row in section.rows if row.label == "align, limit=250").metrics["exact_match"]
    assert first.y == pytest.approx(100 * share.mean)
    assert first.up == first.down == pytest.approx(100 * share.standard_error)
    along = differences_along(section.differences, "student.limit")
    assert list(along) == ["align"]
    for spot, one in zip(along["align"], section.differences, strict=True):
        assert (spot.y, spot.y - spot.down, spot.y + spot.up) == pytest.approx(
            (one.difference, one.low, one.high)
        )
    difference = found.plot("difference from ce over student.limit")
    assert "var(--run-2)" in difference  # its colour in the other plot
    assert "var(--run-1)" not in difference
    assert found.plot("exact match against cost").count("var(--run-2)") > 0


def test_where_nothing_is_a_number_there_is_no_curve(tmp_path):
    sweep = sweep_of(tmp_path, vary={"method": {"ce": {}, "align": {"student": {"lambda_align": 2}}}})
    right = {(name,): RIGHT[name, "limit=250"] for name in ("ce", "align")}
    assert Page(page(compare(gather(sweep, filled(sweep, right))))).plots == []
    assert [
        number_in(value) for value in ("limit=250", "10", "lambda_align=0.5", "10x", "ce", "tail=none")
    ] == [
        250.0,
        10.0,
        0.5,
        None,
        None,
        None,
    ]


# ---- for programs


def test_pandas_reads_the_table(gathered):
    table = pd.read_csv(StringIO(csv_table(gathered)))
    assert len(table) == 11  # of twelve points
    by_variant = table.groupby(["method", "student.limit"])["exact_match"].mean()
    assert by_variant["ce", "limit=250"] == pytest.approx(mean(RIGHT["ce", "limit=250"]) / 400)
    assert set(table["seed"]) == {0, 1, 2}
    assert set(table["teacher"]) == {0.98}
    one = table[(table.method == "align") & (table["student.limit"] == "limit=250") & (table.seed == 1)].iloc[
        0
    ]
    assert (one.blind, one.kl, one.steps, one.flops, one.peak_bytes) == (0.375, 0.25, 10, 7.5e14, 2e6)
    kinds = [name for name in table.columns if name.startswith("exact_match: ")]
    assert kinds == ["exact_match: what is", "exact_match: is there"]
    assert (table[kinds].mean(axis=1) - table["exact_match"]).abs().max() < 1e-9


def test_the_json_is_the_comparison(gathered, tmp_path):
    comparison = compare(gathered)
    paths = write_comparison(comparison, gathered, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == list(FILES)
    assert Comparison.model_validate_json(paths[1].read_text()) == comparison


# ---- the command


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A pipeline's file; its steps left their files, and count as done."""
    sweep = sweep_of(tmp_path)
    known = filled(sweep)
    monkeypatch.setattr("cachekd.pipeline.look", lambda pipeline: list(known.values()), raising=False)
    return tmp_path / "pipeline.yaml"


def test_the_command_prints_and_writes(finished, tmp_path):
    result = CliRunner().invoke(app, ["compare", str(finished)])
    assert result.exit_code == 0, result.exception
    assert "align, limit=250: +1.2 ± 0.6 points over ce, 3 seeds" in result.stdout
    assert "align, limit=1000: no difference seen from ce (+0.1 ± 6.2 points, 3 seeds)" in result.stdout
    assert "Of twenty such intervals" in result.stdout
    assert all((tmp_path / "out" / name).is_file() for name in FILES)


def test_names_are_whole_on_a_narrow_terminal(gathered):
    section = compare(gathered).sections[0]
    shown = StringIO()
    Console(file=shown, width=60).print(table("x", *table_of_means(section)))
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown.getvalue()


def test_json_is_alone_on_stdout_and_a_baseline_can_be_named(finished, tmp_path):
    out = tmp_path / "elsewhere"
    result = CliRunner().invoke(
        app, ["compare", str(finished), "--json", "--baseline", "align", "--out", str(out)]
    )
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert (found["baseline"], found["metric"]) == ("align", "exact_match")
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert not (tmp_path / "out" / FILES[0]).exists()


def test_a_pipeline_that_varies_in_nothing_is_told_what_to_use(tmp_path):
    path = write_pipeline(tmp_path, "data", ("teacher", "model"))
    result = CliRunner().invoke(app, ["compare", str(path)])
    assert isinstance(result.exception, CachekdError)
    assert "nothing varies in this pipeline" in result.exception.problem
    assert "`cachekd eval RUN RUN`" in result.exception.fix
    assert "`cachekd report RUN --baseline RUN`" in result.exception.fix


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_read(tmp_path):
    path = write_pipeline(tmp_path, "data", ("teacher", "model"), seeds=2)
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["compare", str(path), "--out", str(tmp_path / "file" / "below")])
    assert isinstance(result.exception, CachekdError)
    assert str(tmp_path / "file") in str(result.exception)


def test_metrics_of_the_option_are_those_that_there_are():
    from cachekd.compare.results import METRICS
    from cachekd_cli.compare import Metric

    assert [metric.value for metric in Metric] == list(METRICS)


# ---- from training to the table


def test_a_real_sweep_from_training_to_the_table(tmp_path, teacher_path, student_path, data_path):
    """Nothing in between: what `run` leaves is what `compare` reads."""
    vary = {"method": {"ce": {"student": {"lambda_align": 0}}, "align": {}}}
    models = (str(teacher_path), str(student_path))
    path = write_pipeline(tmp_path, str(data_path), models, vary=vary, seeds=2)
    said = path.read_text().replace("lambda_vsd: 0", "lambda_vsd: 0\n  learning_rate: 0.01\n  batch_size: 6")
    path.write_text(said.replace("step: eval", "step: eval\n  blind: false"))
    for command in ("run", "compare"):
        result = CliRunner().invoke(app, [command, str(path), "--json"])
        assert result.exit_code == 0, result.exception
    found = Comparison.model_validate_json(result.stdout)
    [section] = found.sections
    assert [row.label for row in section.rows] == ["ce", "align"]
    assert [row.seeds for row in section.rows] == [[0, 1], [0, 1]]
    [ce, align] = section.rows
    assert ce.cost["flops"].mean > 0
    assert ce.cost["steps"].mean == align.cost["steps"].mean == 2
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    for row in table.itertuples():
        scores = json.loads((Path(row.run).parent / "test" / "scores.json").read_text())
        assert row.exact_match == pytest.approx(scores["models"][0]["exact_match"])
    [one] = section.differences
    by_seed = table.pivot(index="seed", columns="method", values="exact_match")
    assert one.difference == pytest.approx(100 * (by_seed["align"] - by_seed["ce"]).mean())
