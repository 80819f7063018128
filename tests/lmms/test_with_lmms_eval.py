"""With lmms-eval itself: the same answers as `cachekd eval`, question by question.

`make test-benchmarks` makes the environment that this needs; other runs of the tests leave it out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cachekd.config import EvalConfig
from cachekd.data import open_samples
from cachekd.data.batches import BatchLimits
from cachekd.errors import CachekdError
from cachekd.evaluate.run import evaluate
from cachekd.lmms.answer import Answerer, Generation
from cachekd.lmms.environment import LMMS_EVAL, require_lmms_eval
from cachekd.lmms.obstacles import obstacle
from cachekd.lmms.run import open_benchmarks, run_benchmarks
from cachekd.lmms.scores import read_benchmarks
from cachekd.lmms.suite import tasks_of
from cachekd.lmms.task_files import TaskFiles
from cachekd.models import ModelFiles
from cachekd.paths import RUN_FILE
from cachekd_cli.main import app
from caches import ROOT
from tiny_families import FAMILIES, save

pytestmark = pytest.mark.benchmarks

IMAGES = 60
EXAMPLE = ROOT / "examples" / "easy_vqa"
MODELS = [str(EXAMPLE / "student"), str(EXAMPLE / "teacher")]
POPE_PROMPT = "\nAnswer the question using a single word or phrase."  # of lmms-eval's task
TASK = """
task: easy_vqa
dataset_path: parquet
dataset_kwargs:
  token: true
  data_files: {{test: {parquet}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, do_sample: false}}
process_results: !function utils.process_results
metric_list:
- metric: exact_match
  aggregation: mean
  higher_is_better: true
metadata:
- version: 3.0
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]

def doc_to_text(doc):
    return doc["question"]

def process_results(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""


class Questions:
    """Some of easy-VQA's test questions, for lmms-eval and for `cachekd eval`.

    Attributes:
        tasks: a folder with the task `easy_vqa`, over a Parquet file.
        pope: a folder for the task `pope`: those with yes or no.
        own, own_pope: the same for cachekd, in the same order; to the latter POPE's prompt is added.
        counts: how many there are of either.
    """

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset, DatasetDict, Features, Image, Value

        sys.path.insert(0, str(EXAMPLE))
        import data as easy_vqa

        paths, by_image = easy_vqa.image_paths("test"), easy_vqa.questions_by_image("test")
        rows: list[dict[str, Any]] = [
            {
                "question_id": f"{image}-{number}",
                "image": {"bytes": Path(paths[image]).read_bytes(), "path": None},
                "question": question,
                "answer": answer,
                "path": str(paths[image]),
            }
            for image in sorted(paths)[:IMAGES]
            for number, (question, answer) in enumerate(by_image[image])
        ]
        closed = [row for row in rows if row["answer"] in ("yes", "no")]
        text = Value("string")
        features = Features(image=Image(), question_id=text, question=text, answer=text, path=text)
        self.tasks, self.pope = folder / "tasks", folder / "pope"
        self.tasks.mkdir(parents=True)
        Dataset.from_list(rows, features=features).to_parquet(folder / "test.parquet")
        DatasetDict(test=Dataset.from_list(closed, features=features)).save_to_disk(self.pope)
        (self.tasks / "easy_vqa.yaml").write_text(TASK.format(parquet=folder / "test.parquet"))
        (self.tasks / "utils.py").write_text(UTILS)
        self.own = self._written(folder / "own.json", rows, "")
        self.own_pope = self._written(folder / "pope.json", closed, POPE_PROMPT)
        self.counts = len(rows), len(closed)

    @staticmethod
    def _written(path: Path, rows: list[dict[str, Any]], prompt: str) -> Path:
        records = [
            {
                "id": f"{number:06}",
                "image": row["path"],
                "conversations": [
                    # What the task sends: the picture, then the question, with nothing between.
                    {"from": "human", "value": f"<image>{row['question']}{prompt}"},
                    {"from": "gpt", "value": row["answer"]},
                ],
            }
            for number, row in enumerate(rows)
        ]
        path.write_text(json.dumps(records))
        return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Questions:
    return Questions(tmp_path_factory.mktemp("questions"))


def asked(questions: Questions, **settings: Any) -> EvalConfig:
    return EvalConfig(
        **{"models": MODELS, "benchmarks": ("easy_vqa", "pope"), "tasks_dir": questions.tasks}
        | {"benchmark_data": (f"pope={questions.pope}",), "dtype": "float32"}
        | settings
    )


@pytest.fixture(scope="module")
def found(questions):
    """Scores, and what lmms-eval logged of each question, by model and benchmark."""
    logged: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def log(model, came):
        for one in came:
            logged[model, one.scores.name] = sorted(one.samples, key=lambda sample: sample["doc_id"])

    told: list[int] = []
    result = run_benchmarks(asked(questions), lambda model, total, answered: told.append(answered), log)
    assert sum(told) == 2 * sum(questions.counts)
    return result, logged


def test_the_same_answers_as_cachekd_eval_question_by_question(questions, found):
    result, logged = found
    for benchmark, data in (("easy_vqa", questions.own), ("pope", questions.own_pope)):
        ours = evaluate(EvalConfig(models=MODELS, data=str(data), blind=False, dtype="float32"))
        for model, row in zip(MODELS, ours.models, strict=True):
            samples = logged[model, benchmark]
            if benchmark == "pope":
                theirs = [sample["pope_accuracy"]["score"] for sample in samples]
            else:
                theirs = [sample["exact_match"] for sample in samples]
            assert "".join("01"[one == 1.0] for one in theirs) == row.correct
            [scores] = [one for one in result.models if one.name == model]
            metric = scores.on(benchmark).metrics[0]
            assert metric.value == pytest.approx(row.exact_match)
            n, p = len(row.correct), row.exact_match
            assert metric.stderr == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
            print(f"{benchmark}, {Path(model).name}: {n} of {n} questions alike, {p:.5f}")
    student, teacher = (one.on("easy_vqa").metrics[0].value for one in result.models)
    assert student < 0.3 < 0.95 < teacher  # so both kinds of answers were compared


def test_what_a_score_says_of_itself(questions, found):
    result, _ = found
    [student, _] = result.models
    easy, pope = student.benchmarks
    assert (easy.name, easy.version, easy.questions, easy.of) == (
        "easy_vqa",
        "3.0",
        *[questions.counts[0]] * 2,
    )
    assert (pope.data, pope.questions) == (str(questions.pope), questions.counts[1])
    assert [one.name for one in pope.metrics] == [
        f"pope_{name}" for name in ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
    ]
    assert [one.stderr is None for one in pope.metrics] == [False, True, True, True, True]
    assert result.versions["lmms-eval"] == LMMS_EVAL
    assert result.dtype == "float32"


def test_the_command_keeps_scores_in_runs_and_the_teacher_beside(questions, tmp_path):
    run = shutil.copytree(EXAMPLE / "student", tmp_path / "run")
    (run / RUN_FILE).write_text("{}")
    words = [
        "eval",
        str(run),
        "--benchmarks",
        "easy_vqa",
        "--tasks-dir",
        str(questions.tasks),
        "--limit",
        "9",
    ]
    words += ["--teacher", MODELS[1], "--dtype", "float32", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exception is None, done.exception
    printed = json.loads(done.stdout)
    assert printed["models"][0]["benchmarks"][0]["questions"] == 9
    [kept] = read_benchmarks(run)
    assert kept.limit == 9
    assert printed["at"] == kept.at
    assert kept.teacher.on("easy_vqa").metrics[0].value > 0.8
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == printed


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_alone_and_beside_others(family, questions, tmp_path):
    from cachekd.lmms.harness import ask

    config = asked(questions, benchmarks=("easy_vqa",), benchmark_data=())
    files = ModelFiles(save(tmp_path / family, family))
    model = files.load(dtype=torch.float32, device=torch.device("cpu"))
    samples = open_samples(questions.own)
    prompts = [
        files.encoder.prompt(replace(one, messages=one.messages[:1]))
        for one in map(samples.__getitem__, range(6))
    ]
    expected = [one.text for one in Answerer(model, files).answer(prompts, Generation(new_tokens=16))]
    for size in (1, 4):
        answerer = Answerer(model, files, BatchLimits(samples=size))
        [one] = ask(
            answerer, open_benchmarks(config), limit=6, on_error="stop", progress=lambda answered: None
        )
        found = sorted(one.samples, key=lambda sample: sample["doc_id"])
        assert [sample["filtered_resps"] for sample in found] == [[text] for text in expected]


def test_a_question_that_cannot_be_asked_stops_or_counts_as_wrong(questions):
    short = {"benchmarks": ("easy_vqa",), "benchmark_data": (), "max_tokens": 20, "models": MODELS[1:]}
    with pytest.raises(CachekdError, match="too long"):
        run_benchmarks(asked(questions, limit=3, **short))
    result = run_benchmarks(asked(questions, limit=3, on_error="skip", **short))
    [scores] = result.models[0].benchmarks
    assert scores.unanswered.samples == scores.questions == 3
    assert "too long" in scores.unanswered.first["easy_vqa/0"]
    assert scores.metrics[0].value == 0


def test_data_that_cannot_be_had_are_known_before_a_model_is_loaded(questions, tmp_path, monkeypatch):
    def load(*_args, **_settings):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ModelFiles, "load", load)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CachekdError, match=r"data of a benchmark cannot be opened(.|\n)*save_to_disk"):
        run_benchmarks(asked(questions, benchmark_data=(f"pope={tmp_path / 'empty'}",)))
    with pytest.raises(CachekdError, match="there is no such folder"):
        run_benchmarks(asked(questions, benchmark_data=(f"pope={tmp_path / 'none'}",)))
    with pytest.raises(CachekdError, match="data for a benchmark that is not asked"):
        run_benchmarks(asked(questions, benchmarks=("easy_vqa",)))
    (tmp_path / "choice.yaml").write_text("task: choice\noutput_type: multiple_choice\n")
    with pytest.raises(CachekdError, match="choice: it compares the probabilities"):
        run_benchmarks(asked(questions, benchmarks=("choice",), tasks_dir=tmp_path, benchmark_data=()))


def test_data_on_a_hub_that_is_not_there_are_named(questions, monkeypatch):
    with pytest.raises(
        CachekdError, match=r"realworldqa(.|\n)*--benchmark-data realworldqa=FOLDER"
    ) as caught:
        open_benchmarks(asked(questions, benchmarks=("realworldqa",), benchmark_data=()))
    assert "RetryError" not in str(caught.value)


def test_lmms_evals_own_tasks_are_told_apart():
    files = TaskFiles([require_lmms_eval()])
    tasks = [task for task in files.by_name.values() if not task.members]
    reasons = [obstacle(task, logged_in=True) for task in tasks]
    assert len(tasks) > 1_300
    assert 900 > reasons.count(None) > 800
    well_known = (
        "pope gqa vqav2_val textvqa_val mme mmbench_en_dev_static scienceqa_img vizwiz_vqa_val ai2d chartqa "
    )
    well_known += "docvqa_val mmstar seedbench realworldqa ok_vqa_val2014 mmmu_val ocrbench"
    for task in files.tasks(well_known.split()):
        assert obstacle(task, logged_in=True) is None, task.name
    without = {
        name: obstacle(task, logged_in=False) for name in ("gqa", "pope") for task in files.tasks([name])
    }
    assert "login" in without["gqa"]
    assert without["pope"] is None
    for name in ("mmbench_en_dev", "mmvet", "llava_in_the_wild", "mathverse_testmini"):
        assert all("judges" in obstacle(task, logged_in=True) for task in files.tasks([name])), name


def test_the_suites_tasks_are_there_and_its_own_can_be_loaded():
    from lmms_eval.utils import load_yaml_config

    from cachekd.lmms.run import OWN_TASKS

    files = TaskFiles([OWN_TASKS, require_lmms_eval()])
    tasks = files.tasks(tasks_of("switch-kd"))
    assert [task.name for task in tasks] == list(tasks_of("switch-kd"))
    assert all(obstacle(task, logged_in=True) is None for task in tasks)
    [own] = [task for task in tasks if task.path.parent == OWN_TASKS]
    config = load_yaml_config(str(own.path), mode="full")
    item = {"index": 1, "answer": "A", "category": "c", "L2-category": "l", "A": "red", "B": "blue"}
    item |= {"question": "?", "hint": "nan", "source": "s", "split": "dev"}
    results = [config["process_results"](item, [text])["gpt_eval_score"] for text in ("A",)]
    other = config["process_results"](item | {"index": 2}, ["I cannot say"])["gpt_eval_score"]
    assert config["metric_list"][0]["aggregation"]([*results, other]) == 50.0


def test_lmms_evals_command_knows_the_model(questions, tmp_path):
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "cachekd",
        "--tasks",
        "easy_vqa",
        "--limit",
        "20",
    ]
    command += [
        "--model_args",
        f"pretrained={MODELS[1]},dtype=float32",
        "--include_path",
        str(questions.tasks),
    ]
    command += ["--batch_size", "8", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300, check=False)
    [file] = (tmp_path / "out").rglob("*_results.json")
    scores = json.loads(file.read_text())["results"]["easy_vqa"]
    assert scores["exact_match,none"] > 0.8, done.stderr[-2000:]


def test_the_entry_point_imports_neither_torch_nor_transformers():
    code = "import sys, cachekd.lmms; print(*{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
