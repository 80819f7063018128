"""Pipelines that vary, and what their finished steps leave, as far as a comparison reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from cachekd.data.left_out import LeftOutSamples
from cachekd.evaluate import Evaluation, QuestionSet, Score
from cachekd.paths import RUN_FILE, SCORES_FILE
from cachekd.pipeline import read_pipeline
from cachekd.pipeline.state import StepState
from cachekd.pipeline.vary import Sweep, expand
from cachekd.train.cost import Cost

QUESTIONS = 400  # two about each sample, one of each type
AXES = {"method": {"ce": {}, "align": {"student": {"lambda_align": 2}}}, "student.limit": [250, 1000]}
# By method, at 250 and at 1,000 samples, for seeds 0 to 2: right answers.
RIGHT = {
    ("ce", "limit=250"): [200, 220, 210],
    ("align", "limit=250"): [204, 226, 215],
    ("ce", "limit=1000"): [300, 310, 305],
    ("align", "limit=1000"): [310, 300, 306],
}


def write_pipeline(folder: Path, data: str, models: tuple[str, str], **settings) -> Path:
    """A dump, a training and an evaluation."""
    teacher, student = models
    steps = [
        {"step": "dump", "name": "cache"},
        {"step": "train", "name": "student", "lambda_vsd": 0},
        {"step": "eval", "name": "test", "data": data},
    ]
    defaults = {"teacher": teacher, "student": student, "data": data}
    said = {"out": str(folder / "out"), "defaults": defaults, "steps": steps, **settings}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return path


def sweep_of(folder: Path, **settings) -> Sweep:
    """Two methods, two sizes and three seeds, unless said otherwise."""
    given = {"vary": AXES, "seeds": 3} | settings
    return expand(read_pipeline(write_pipeline(folder, "data", ("teacher", "model"), **given)))


def score(name: str, right: int, **others) -> Score:
    """Of a model that has so many right, of each type as many."""
    answers = np.zeros(QUESTIONS, bool)
    answers[:right] = True
    share, half = (
        right / QUESTIONS,
        answers[::2].mean(),
    )
    types = {"what is": float(half), "is there": float(answers[1::2].mean())}
    return Score(
        name=name, exact_match=share, by_type=types, correct="".join("01"[int(a)] for a in answers), **others
    )


def finish(
    point, right: int, *, teacher: int = 392, fingerprint="a" * 64, cost: Cost | None = None, **others
) -> None:
    """Write what a point's steps leave, as far as a comparison reads it."""
    student, test = point.steps["student"], point.steps["test"]
    student.out.mkdir(parents=True, exist_ok=True)
    names = ("config", "versions", "cache", "k_histogram", "seconds", "steps", "resumed_from", "log")
    saved = dict.fromkeys((*names, "uncovered_samples", "left_out", "data_wait"))
    if cost is not None:
        saved["cost"] = cost.model_dump()
    (student.out / RUN_FILE).write_text(json.dumps(saved))
    asked = QuestionSet(
        data="data/test",
        fingerprint=fingerprint,
        history="none",
        questions=QUESTIONS,
        per_sample=[2] * (QUESTIONS // 2),
        types={"what is": QUESTIONS // 2, "is there": QUESTIONS // 2},
        unasked_answers=0,
        left_out=LeftOutSamples(),
    )
    test.out.mkdir(parents=True, exist_ok=True)
    found = Evaluation(
        asked=asked,
        dtype="float32",
        teacher=score("teacher", teacher),
        models=[score(str(student.out), right, **others)],
        prior=score("data", 160),
    )
    (test.out / SCORES_FILE).write_text(found.model_dump_json())


def states(sweep: Sweep, **other: str) -> dict[Path, StepState]:
    """All done, but for the steps of points that are named with another state."""
    found = {}
    for point in sweep.points:
        for name, step in point.steps.items():
            state, _, why = other.get(f"{point.name} {name}", "done").partition(": ")
            found[step.out] = StepState(step, state, why, 0.0, {})
    return found


def filled(sweep: Sweep, right=RIGHT, **others) -> dict[Path, StepState]:
    for point in sweep.points:
        finish(point, right[tuple(point.variant.values())][point.seed], **others)
    return states(sweep)
