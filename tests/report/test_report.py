"""The report: one page that stands alone, says what the numbers say, and copes with what is not there."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cachekd.config import EvalConfig, TrainConfig
from cachekd.data.left_out import LeftOutSamples
from cachekd.errors import CachekdError
from cachekd.evaluate import CellCoverage, Evaluation, QuestionSet, Score, save_in_runs
from cachekd.evaluate.run import evaluate
from cachekd.evaluate.scores import paired_intervals
from cachekd.paths import REPORT_FILE, RUN_FILE
from cachekd.report import build_report, read_run, write_report
from cachekd.report.accuracy import sections, verdict
from cachekd.report.runs import RUN_COLORS, as_read, told_apart
from cachekd.train import train
from cachekd_cli.main import app
from pages import Page

PHONE = 390  # pixels
PER_SAMPLE = [3] * 40


def page_of(run: Path, *baselines: Path) -> Page:
    return Page(build_report(read_run(run), [read_run(one) for one in baselines]))


page_once = cache(page_of)  # of runs that no test changes


SHORT = {"epochs": 2, "logging_steps": 1, "batch_size": 6}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student_path, teacher_path, data_path, cache_path) -> tuple[Path, Path]:
    """Switch-KD and CE-only, not evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"student": str(student_path), "data": data_path, **SHORT}
    train(TrainConfig(out=folder / "ce", lambda_align=0, lambda_vsd=0, seed=7, **common))
    train(
        TrainConfig(out=folder / "kd", teacher=str(teacher_path), cache=cache_path, lambda_vsd=0.5, **common)
    )
    return folder / "kd", folder / "ce"


def copied(run: Path, folder: Path, change=lambda record: None) -> Path:
    """A run's record in another folder, with `change` applied."""
    record = json.loads((run / RUN_FILE).read_text())
    change(record)
    folder.mkdir(parents=True)
    (folder / RUN_FILE).write_text(json.dumps(record))
    return folder


def score(name, share, seed=0, **others) -> Score:
    """Of a model that knows this share of the answers."""
    right = np.random.default_rng(seed).random(sum(PER_SAMPLE)) < share
    types = {"what is": float(right[::2].mean()), "is there": float(right[1::2].mean())}
    correct = "".join("01"[int(one)] for one in right)
    return Score(name=str(name), exact_match=float(right.mean()), by_type=types, correct=correct, **others)


def evaluated(run: Path, share: float, fingerprint="a" * 64, *, data="data/test", blind=True) -> Path:
    """The run with scores, as `cachekd eval` leaves them."""
    questions = sum(PER_SAMPLE)
    asked = QuestionSet(
        data=data,
        fingerprint=fingerprint,
        history="none",
        questions=questions,
        per_sample=PER_SAMPLE,
        types={"what is": questions // 2, "is there": questions // 2},
        unasked_answers=0,
        left_out=LeftOutSamples(),
    )
    own = score(
        run,
        share,
        seed=1,
        top1_agreement=0.75,
        kl=0.25,
        agrees_with="models/teacher",
        blind=score(run, 0.3, seed=2) if blind else None,
    )
    teacher, prior = score("models/teacher", 0.95, seed=3), score("data/train", 0.35, seed=4)
    save_in_runs(Evaluation(asked=asked, dtype="float32", teacher=teacher, models=[own], prior=prior))
    return run


@pytest.fixture
def runs(trained, tmp_path) -> tuple[Path, Path]:
    kd, ce = (copied(run, tmp_path / run.name) for run in trained)
    return evaluated(kd, 0.8), evaluated(ce, 0.5)


def test_the_page_stands_alone_and_shows_the_numbers(runs):
    kd, ce = runs
    path = write_report(kd, [ce])
    assert path == kd / REPORT_FILE
    page = Page(path.read_text())
    assert page.fetched == []
    assert re.findall(r"url\((?!#)", page.html) == []
    assert "Accuracy on data/test (120 questions, 40 samples)" in page.text
    own = read_run(kd).evaluations[0].models[0]
    assert page.row("kd") == ["kd", f"{100 * own.exact_match:.2f} %", "75.00 %", "0.2500"]
    assert page.row("kd, blind")[1] == f"{100 * own.blind.exact_match:.2f} %"
    for word in (
        "L_CE",
        "L_Align",
        "L_VSD",
        "bytes per token",
        "what is ...",
        "models/teacher",
        "data/train",
    ):
        assert word in page.text


def test_the_same_run_gives_the_same_page(runs, tmp_path):
    kd, ce = runs
    pages = [write_report(kd, [ce], tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_every_row_is_compared_with_its_paired_interval(runs):
    page = page_of(*runs)
    [kd], [ce] = (read_run(run).evaluations[0].models for run in runs)
    own = read_run(runs[0]).evaluations[0]
    others = {"ce": ce, "teacher": own.teacher, "kd, blind": kd.blind, "prior": own.prior}
    for name, other in others.items():
        [(low, high)] = paired_intervals(np.stack([kd.right, other.right]), [(0, 1)], PER_SAMPLE)
        difference = 100 * (kd.exact_match - other.exact_match)
        expected = f"{difference:+.1f} points ({100 * low:.1f} to {100 * high:.1f})"
        assert page.row(f"kd against {name}")[1] == expected
    assert "ce against ce, blind" in page.text
    assert "ce against prior" in page.text


def said_of(run: Path, *baselines: Path) -> str:
    named = told_apart([read_run(one) for one in (run, *baselines)])
    return verdict(named, sections(named))


@pytest.mark.parametrize(
    ("ours", "theirs", "judged"),
    [(0.3, 0.7, "more than chance"), (0.7, 0.3, "more than chance"), (0.5, 0.51, "may be chance")],
)
def test_a_loss_is_called_a_loss_and_chance_chance(trained, tmp_path, ours, theirs, judged):
    kd, ce = (
        evaluated(copied(run, tmp_path / run.name), share)
        for run, share in zip(trained, (ours, theirs), strict=True)
    )
    [kd_score], [ce_score] = (read_run(run).evaluations[0].models for run in (kd, ce))
    right = np.stack([kd_score.right, ce_score.right])
    [(low, high)] = paired_intervals(right, [(0, 1)], PER_SAMPLE)
    assert (low > 0 or high < 0) == (judged == "more than chance")
    difference = 100 * (kd_score.exact_match - ce_score.exact_match)
    said = said_of(kd, ce)
    assert said.startswith(f"kd answers {100 * kd_score.exact_match:.1f} % of the questions exactly")
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    assert f"{difference:+.1f} points against ce ({interval}, {judged})" in said
    assert "against its teacher's" in said


def test_scores_on_different_questions_are_refused(trained, tmp_path):
    kd = evaluated(copied(trained[0], tmp_path / "kd"), 0.8)
    ce = evaluated(copied(trained[1], tmp_path / "ce"), 0.1, "b" * 64, data="data/other")
    with pytest.raises(CachekdError, match="different questions") as caught:
        write_report(kd, [ce])
    assert "data/test (120 questions, aaaaaaaa)" in str(caught.value.expected)
    assert "data/other (120 questions, bbbbbbbb)" in str(caught.value.found)
    assert caught.value.fix == f"cachekd eval {kd} {ce} --data data/test"
    assert not (kd / REPORT_FILE).exists()


def test_each_set_has_its_section_and_namesakes_are_told_apart(runs):
    kd, ce = runs
    evaluated(kd, 0.4, "b" * 64, blind=False)
    page = page_of(kd, ce)
    assert page.html.count("<h2>Accuracy on data/test") == 2
    assert page.text.count("not to be compared") == 2
    assert "data/test (120 questions, bbbbbbbb)" in page.text
    assert "Not asked these questions: ce." in page.text
    newest = next(one for one in read_run(kd).evaluations if one.asked.fingerprint[0] == "b")
    assert f"kd answers {100 * newest.models[0].exact_match:.1f} %" in page.text
    first, second = page.html.split("<h2>Accuracy on data/test")[1:]
    assert "against ce" not in first
    assert "kd against ce" in second


def test_another_teachers_agreement_is_not_shown(runs):
    kd, ce = runs
    for path in (ce / "evaluations").iterdir():
        path.write_text(path.read_text().replace("models/teacher", "models/another"))
    page = page_of(kd, ce)
    assert page.row("ce")[2:] == ["", ""]
    assert "another teacher, models/another" in page.text


def test_agreement_over_cells_is_told_from_that_of_tokens(runs):
    kd, ce = runs
    cells = CellCoverage(
        tokenizer="b", compared=1900, tokens=2000, differing=3, first={"s1, question 1": "x"}
    )
    for path in (ce / "evaluations").iterdir():
        found = Evaluation.model_validate_json(path.read_text())
        own = found.models[0].model_copy(update={"over_cells": cells})
        path.write_text(found.model_copy(update={"models": [own]}).model_dump_json())
    page = page_of(kd, ce)
    assert page.row("ce (over cells)")[2:] == ["75.00 %", "0.2500"]
    assert page.row("kd")[2:] == ["75.00 %", "0.2500"]
    said = (
        "agreement and KL are over cells, at 1,900 of 2,000 answer tokens; 3 answers have other bytes for it"
    )
    assert page.text.count(said) == 1


def test_what_was_not_evaluated_is_said(trained, runs, tmp_path):
    copy = copied(trained[0], tmp_path / "new")
    (copy / "cachekd_eval.json").write_text('{"models": []}')  # of earlier versions
    text = page_of(copy, runs[1]).text
    assert "has not been evaluated" in text
    assert "L_VSD" in text
    assert "Not evaluated yet (cachekd eval does it): new." in page_of(runs[0], copy).text


def test_a_run_without_cache_says_so(runs):
    page = page_of(runs[1])
    assert "used no cache: plain cross-entropy" in page.text
    assert [title for title, _ in page.plots] == ["L_CE", "gradient norm", "learning rate"]


def test_shares_are_of_the_weighted_terms(trained, tmp_path):
    log = json.loads((trained[0] / RUN_FILE).read_text())["log"]
    steps = [entry for entry in log if "loss" in entry]
    total = steps[0]["ce"] + steps[0]["align"] + 0.5 * steps[0]["vsd"]
    page = page_once(trained[0])
    assert page.row("weighted term")[2:] == ["step 1", "share", "step 4", "share"]
    assert page.row("L_VSD")[3] == f"{100 * 0.5 * steps[0]['vsd'] / total:.2f} %"

    def switched_in_some_steps(record):
        del record["log"][3]["vsd"]

    page = page_of(copied(trained[0], tmp_path / "every", switched_in_some_steps))
    assert page.row("weighted term")[4] == "step 3"
    assert page.row("L_CE")[4] == f"{steps[2]['ce']:.4f}"
    assert "the last entry that has all terms; the run has 4 steps" in page.text


def test_values_are_as_people_read_them(trained, tmp_path):
    def change(record):
        record["config"] |= {
            "gradient_checkpointing": True,
            "lora": {"r": 16, "target_modules": ["q_proj", "v_proj"], "use_dora": False},
            "training": {"optim_args": None, "report_to": ["tensorboard"], "bf16_full_eval": False},
            "max_tokens": 32768,
            "seed": 20260101,
        }

    page = page_of(copied(trained[0], tmp_path / "kd", change), trained[1])
    for python in ("None", "True", "False", "[", "{", "()", "inf"):
        assert python not in page.text.replace("Kneedle's", "")
    assert page.row("lora.target_modules") == ["lora.target_modules", "q_proj, v_proj", "not set"]
    assert page.row("gradient_checkpointing") == ["gradient_checkpointing", "yes", "no"]
    assert page.row("max_tokens")[1] == "32,768"
    assert page.row("seed")[1:] == ["20260101", "7"]
    assert page.row("warmup")[1:] == ["3 %"] * 2
    assert page.row("learning_rate")[1] == "2e-5"


@pytest.mark.parametrize(
    ("value", "read"),
    [(None, "not set"), (False, "no"), (0, "0"), (12345, "12,345"), (0.1, "0.1"), ({"a": [1, 2]}, "a 1, 2")],
)
def test_a_value_is_read(value, read):
    assert as_read("any", value) == read


def test_settings_that_differ_are_on_top_and_the_equal_ones_folded(trained):
    page = page_once(*trained)
    top, folded = page.html.split("<h2>Settings that differ</h2>")[1].split("<details>")
    found = [Page(part) for part in (top, folded)]
    assert found[0].row("setting")[1:] == ["kd", "ce"]
    assert found[0].row("seed")[1:] == ["0", "7"]
    assert found[0].row("lambda_vsd")[1:] == ["0.5", "0"]
    assert found[0].row("cache")[2] == "not set"
    assert found[1].row("batch_size")[1:] == ["6", "6"]
    assert found[1].row("torch version")[1] == found[1].row("torch version")[2]
    alone = page_once(trained[1]).html.split("<h2>Settings</h2>")[1].split("<details>")
    assert Page(alone[0]).row("batch_size")[1:] == ["6"]
    assert Page(alone[1]).row("temperature")[1:] == ["3"]


def test_a_run_has_one_colour_in_every_plot_and_a_legend_with_its_name(trained, tmp_path):
    others = [copied(trained[0], tmp_path / f"kd-{number}") for number in range(6)]
    page = page_of(*trained, *others)
    runs = {"kd": "run-1", "ce": "run-2", **{f"kd-{n}": f"run-{n + 3}" for n in range(6)}}
    legends = re.findall(r'<ul class="legend">(.*?)</ul>', page.html, flags=re.DOTALL)
    assert len(legends) == 2  # of losses and of the optimizer
    for legend in legends:
        items = re.findall(r"background: var\(--(run-\d)\)\"></i>(.*?)</li>", legend)
        assert {name: color for color, name in items} == runs
    without_ce = set(runs.values()) - {"run-2"}
    for title, svg in page.plots:
        drawn = set(re.findall(r"stroke: var\(--(run-\d)\)", svg))
        assert drawn == (without_ce if title in ("L_Align", "L_VSD") else set(runs.values())), title
    assert page_once(trained[0]).html.count('<ul class="legend">') == 2


def test_plots_take_their_colours_from_the_page(runs):
    page = page_of(*runs)
    drawn = re.findall(r"<svg.*?</svg>", page.html, flags=re.DOTALL)
    assert len(drawn) == 6
    for svg in drawn:
        assert re.findall(r"(?:fill|stroke): *#", svg) == []
    names = set(re.findall(r"var\(--([a-z0-9-]+)\)", page.html))
    light, dark = (set(scheme) for scheme in palettes(page.html))
    assert names <= light
    assert light == dark


def palettes(page: str) -> list[dict[str, str]]:
    """The colours by name, for light and for dark."""
    blocks = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    return [dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block)) for block in blocks]


# Linear RGB as the colour-blind see it (Machado et al. 2009, severity 1).
VISION = {
    "full": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(color: str) -> np.ndarray:
    rgb = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.clip(rgb, 0, 1) @ np.array(to_xyz).T / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_differ_for_every_eye_and_stand_out(trained, scheme):
    palette = palettes(page_once(trained[0]).html)[scheme]
    luminance = {name: float(linear(color) @ [0.2126, 0.7152, 0.0722]) for name, color in palette.items()}

    def contrast(name):
        low, high = sorted([luminance[name], luminance["bg"]])
        return (high + 0.05) / (low + 0.05)

    assert min(map(contrast, [*RUN_COLORS, "teacher", "prior", "stored"])) >= 3  # WCAG 2.2, graphics
    assert min(map(contrast, ["fg", "dim", "plot-text"])) >= 4.5  # text
    colors = np.stack([linear(palette[name]) for name in RUN_COLORS])
    for vision in VISION.values():
        seen = lab(colors @ np.array(vision).T)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distances[~np.eye(len(seen), dtype=bool)].min() > 20


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_are_whole_and_the_last_one_is_there(trained, tmp_path, steps):
    def cut(record):
        record["log"] = record["log"][:steps]
        record["steps"] = steps

    page = page_of(copied(trained[0], tmp_path / "kd", cut))
    for title, svg in page.plots:
        axis = svg.split('id="matplotlib.axis_1"')[1].split('id="matplotlib.axis_2"')[0]
        ticks = re.findall(r"<text[^>]*>([^<]*)</text>", axis)
        assert ticks[-1] == "optimizer step"
        assert [tick for tick in ticks[:-1] if not tick.isdigit()] == [], title
        assert len(set(ticks)) == len(ticks) > 1, title  # 1, 1.5 and 2 would be read as 1, 2 and 2
        assert len(marks(svg, "run-1")) == steps
    assert page.row("weighted term")[-2] == f"step {steps:,}"


def marks(svg: str, color: str) -> list[str]:
    """A curve's marked points."""
    return re.findall(rf"<use [^>]*style=\"fill: var\(--{color}\)", svg)


def test_axes_say_what_they_measure(trained):
    units = {
        title: (re.findall(r"<text[^>]*rotate\(-90[^>]*>([^<]*)</text>", svg), "optimizer step" in svg)
        for title, svg in page_once(trained[0]).plots
    }
    loss = (["nats per answer token"], True)
    assert units == {
        "L_CE": loss,
        "L_Align": loss,
        "L_VSD": loss,
        "gradient norm": (["L2 norm"], True),
        "learning rate": (["learning rate"], True),
    }


def with_validation(record):
    for place, (loss, accuracy) in enumerate([(3.0, 0.25), (2.0, 0.5), (2.5, 0.4)]):
        terms = {"eval_ce": loss, "eval_align": loss / 2, "eval_vsd": loss / 4}
        entry = {"step": place + 1, "eval_loss": 2 * loss, "eval_token_accuracy": accuracy}
        record["log"].insert(2 * place + 1, entry | terms)
    record["best_step"] = 2
    record["evaluation"] = {"eval_loss": 4.0, "eval_token_accuracy": 0.5}
    record["eval_left_out"] = {"missing": {"samples": 0}, "bad": {"samples": 1234}}


def dashed(svg: str, color: str) -> list[str]:
    return re.findall(rf"stroke-dasharray: [^\"]*; stroke: var\(--{color}\)", svg)


def test_held_out_curves_are_dashed_in_the_runs_colour_with_the_best_step_marked(trained, tmp_path):
    page = page_of(copied(trained[0], tmp_path / "kd", with_validation), trained[1])
    assert "dashed: held-out data" in page.text
    for title in ("L_CE", "L_Align", "L_VSD", "held-out loss", "held-out accuracy"):
        svg = page.plot(title)
        assert len(dashed(svg, "run-1")) == 1
        assert dashed(svg, "run-2") == []
        trained_too = title.startswith("L_")
        assert len(marks(svg, "run-1")) == 4 * trained_too + 3 + 1  # its steps, the checks, the star
    assert page.row("best step on held-out data")[1:] == ["2", "not set"]
    assert page.row("held-out accuracy")[1:] == ["50 %", "not set"]
    assert page.row("held-out samples left out: bad")[1:] == ["1,234", "not set"]
    assert "50" in re.findall(r">(\d+)</text>", page.plot("held-out accuracy"))  # percent
    without = page_once(*trained)
    assert "held-out" not in without.text.replace("best step on held-out data", "")
    assert "stroke-dasharray" not in without.plot("L_CE")


def test_namesakes_are_named_by_their_paths(trained, tmp_path):
    runs = [copied(trained[0], tmp_path / seed / "kd") for seed in ("seed-1", "seed-2")]
    text = page_of(*runs).text
    assert "seed-1/kd" in text
    assert "seed-2/kd" in text


def test_what_cannot_be_compared_is_refused(trained, tmp_path):
    with pytest.raises(CachekdError, match="compared with itself"):
        write_report(trained[0], [trained[1], trained[0].parent / "." / "kd"], tmp_path / "page.html")
    many = [copied(trained[0], tmp_path / str(number)) for number in range(len(RUN_COLORS))]
    with pytest.raises(CachekdError, match="8 runs at most"):
        write_report(trained[0], many, tmp_path / "page.html")


def test_hostile_text_is_escaped(trained, tmp_path):
    def hostile(record):
        record["config"]["student"] = "<script>alert(1)</script>"

    run = evaluated(copied(trained[0], tmp_path / "<b>kd", hostile), 0.5, data="<script>x</script>")
    text = write_report(run, []).read_text()
    assert "<script" not in text
    assert "<b>kd" not in text
    assert "&lt;script&gt;" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CachekdError, match="not a run"):
        write_report(tmp_path, [])
    assert not list(tmp_path.iterdir())
    (tmp_path / RUN_FILE).write_text('{"config": ')
    with pytest.raises(CachekdError, match="cannot be read"):
        write_report(tmp_path, [])


def test_a_page_has_its_folder_made_and_no_place_is_refused_first(trained, tmp_path):
    out = tmp_path / "x" / "y" / "z.html"
    assert write_report(trained[0], [], out) == out
    assert out.read_text().startswith("<!doctype html>")
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(out / "below.html")])
    assert isinstance(result.exception, CachekdError)
    assert "cannot be written" in str(result.exception)


def test_text_in_plots_is_legible_on_a_phone(runs):
    for svg in re.findall(r"<svg.*?</svg>", page_of(*runs).html, flags=re.DOTALL):
        width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
        smallest = min(map(float, re.findall(r"font-size: ([\d.]+)px", svg)))
        assert smallest * (PHONE - 40) / width >= 12


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [PHONE, 1280])
def test_nothing_sticks_out_of_the_page(trained, runs, tmp_path, width):
    long = evaluated(copied(trained[0], tmp_path / ("a-run-with-a-name-" * 6), with_validation), 0.6)
    page = page_of(runs[0], runs[1], long).html.replace("<details>", "<details open>")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="page" style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(page)}" '
        'onload="document.title = this.contentDocument.documentElement.scrollWidth"></iframe>'
    )
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    chromium += [f"--user-data-dir={tmp_path}/c"]
    found = subprocess.run(
        [*chromium, "--dump-dom", str(frame)], capture_output=True, text=True, check=True, timeout=120
    )
    assert re.findall(r"<title>(\d+)</title>", found.stdout) == [str(width)]


def test_from_training_and_evaluation_to_the_page(
    student_path, teacher_path, data_path, cache_path, tmp_path
):
    """Nothing in between: what `train` and `eval` leave is what the report reads."""
    held_out = {"eval_data": data_path, "eval_steps": 2}
    common = {"student": str(student_path), "data": data_path, **SHORT}
    train(TrainConfig(out=tmp_path / "ce", lambda_align=0, lambda_vsd=0, **common))
    distilled = {"teacher": str(teacher_path), "cache": cache_path, "eval_cache": cache_path}
    train(TrainConfig(out=tmp_path / "kd", **distilled, **held_out, **common))
    paths = [str(tmp_path / name) for name in ("kd", "ce")]
    asked = EvalConfig(models=paths, data=data_path, teacher=str(teacher_path), prior_data=data_path)
    result = evaluate(asked)
    save_in_runs(result)
    page = page_of(tmp_path / "kd", tmp_path / "ce")
    assert f"({result.asked.questions} questions, {len(result.asked.per_sample)} samples)" in page.text
    for name, model in zip(("kd", "ce"), result.models, strict=True):
        assert page.row(name)[1] == f"{100 * model.exact_match:.2f} %"
        assert page.row(f"{name}, blind")[1] == f"{100 * model.blind.exact_match:.2f} %"
    assert page.row("prior")[1] == f"{100 * result.prior.exact_match:.2f} %"
    assert dashed(page.plot("L_VSD"), "run-1")
    log = json.loads((tmp_path / "kd" / RUN_FILE).read_text())["log"]
    last = [entry["eval_token_accuracy"] for entry in log if "eval_loss" in entry][-1]
    assert page.row("held-out accuracy")[1] == f"{100 * last:.3g} %"
