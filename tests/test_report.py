"""The report: one page that stands alone, says what the numbers say, and copes with what is not there."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.evaluate import evaluate
from cachekd.files import EVAL_FILE, REPORT_FILE, RUN_FILE
from cachekd.report import read_run, verdict, write_report
from cachekd.train import train
from cachekd_cli.evaluate import save_in_runs


class Page(HTMLParser):
    """Collects text and everything that a browser would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.fetched, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value[:1] != "#"]
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, student_path, teacher_path, data_path, cache_path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    common = {
        "student": str(student_path),
        "data": data_path,
        "epochs": 2,
        "logging_steps": 1,
        "batch_size": 6,
    }
    train(TrainConfig(out=folder / "ce", lambda_align=0, lambda_vsd=0, **common))
    train(
        TrainConfig(out=folder / "kd", teacher=str(teacher_path), cache=cache_path, lambda_vsd=0.5, **common)
    )
    save_in_runs(evaluate([str(folder / "ce"), str(folder / "kd")], data_path, teacher=str(teacher_path)))
    return folder / "kd", folder / "ce"


def edited(tmp_path: Path, run: Path, name: str, change) -> Path:
    """A copy of a run's two files with `change` applied to one of them."""
    copy = tmp_path / run.name
    copy.mkdir()
    for file in (RUN_FILE, EVAL_FILE):
        values = json.loads((run / file).read_text())
        (copy / file).write_text(json.dumps(change(values) if file == name else values))
    return copy


def test_the_page_stands_alone_and_shows_the_numbers(runs):
    kd, ce = runs
    page = write_report(kd, [ce])
    assert page == kd / REPORT_FILE
    html = page.read_text()
    parsed = Page(html)
    assert parsed.fetched == []
    assert re.findall(r"url\((?!#)", html) == []
    text = " ".join(" ".join(parsed.text).split())
    score = json.loads((kd / EVAL_FILE).read_text())["models"][0]
    assert f"{100 * score['exact_match']:.2f} %" in text
    for word in (
        "L_CE",
        "L_Align",
        "L_VSD",
        "lambda_vsd 0.5",
        "bytes per token",
        "transformers",
        "what is ...",
    ):
        assert word in text


def test_the_same_run_gives_the_same_page(runs, tmp_path):
    kd, ce = runs
    pages = [write_report(kd, [ce], tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_shares_are_of_the_weighted_terms(runs):
    first = json.loads((runs[0] / RUN_FILE).read_text())["log"][0]
    total = first["ce"] + first["align"] + 0.5 * first["vsd"]
    text = " ".join(Page(write_report(runs[0], []).read_text()).text)
    assert f"{100 * 0.5 * first['vsd'] / total:.2f} %" in text


def test_a_loss_is_called_a_loss(runs, tmp_path):
    def worse(values):
        values["models"][0]["exact_match"] = 0.25
        values["teacher"]["exact_match"] = 0.5
        return values

    def better(values):
        values["models"][0]["exact_match"] = 0.4
        return values

    kd, ce = edited(tmp_path, runs[0], EVAL_FILE, worse), edited(tmp_path, runs[1], EVAL_FILE, better)
    said = verdict(read_run(kd), [read_run(ce)])
    assert "25.0 %" in said
    assert "-15.0 points against ce" in said
    assert "-25.0 points against its teacher's 50.0 %" in said


def test_a_run_that_was_not_evaluated_says_so(runs, tmp_path):
    copy = edited(tmp_path, runs[0], RUN_FILE, lambda values: values)
    (copy / EVAL_FILE).unlink()
    text = " ".join(Page(write_report(copy, [runs[1]]).read_text()).text)
    assert "has not been evaluated" in text
    assert "L_VSD" in text


def test_a_run_without_cache_says_so(runs):
    text = " ".join(Page(write_report(runs[1], []).read_text()).text)
    assert "used no cache" in text
    assert "L_VSD" not in text


def test_hostile_text_is_escaped(runs, tmp_path):
    def hostile(values):
        values["config"]["student"] = "<script>alert(1)</script>"
        return values

    html = write_report(edited(tmp_path, runs[0], RUN_FILE, hostile), []).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CachekdError, match="not a run"):
        write_report(tmp_path, [])
    assert not list(tmp_path.iterdir())
