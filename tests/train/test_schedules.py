"""Weights that change over the steps: hand-made values, in training, in the log, and through a resumption."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachekd.config import TrainConfig, read_config
from cachekd.config.weights import Schedule, highest, weight_at, written
from cachekd.errors import CachekdError
from cachekd.models import load_model
from cachekd.paths import RUN_FILE
from cachekd.report import build_report, read_run
from cachekd.report.runs import term_shares
from cachekd.train import train
from cachekd.train.batch import collate_with_targets
from cachekd.train.callbacks import RunStopped
from cachekd.train.estimate import _quiet
from cachekd.train.open import make_trainer
from cachekd.train.reach import prove_gradients

MIDDLE = {"schedule": "linear", "start": 0, "end": 2, "after": 0.25, "over": 0.5}
COSINE = {"schedule": "cosine", "start": 3, "end": 1}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"schedule": "constant", "start": 0.7}, [0.7] * 9),
        ({"schedule": "linear", "start": 0, "end": 2}, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]),
        (MIDDLE, [0, 0, 0, 0.5, 1, 1.5, 2, 2, 2]),
        (COSINE, [3, None, 2 + math.sqrt(0.5), None, 2, None, 2 - math.sqrt(0.5), None, 1]),
    ],
)
def test_hand_made_values_over_nine_steps(said, expected):
    weights = [weight_at(Schedule(**said), step, 9) for step in range(9)]
    assert weights == [
        pytest.approx(want) if want is not None else have
        for have, want in zip(weights, expected, strict=True)
    ]
    assert highest(Schedule(**said)) == max(want for want in expected if want is not None)


@given(
    kind=st.sampled_from(["linear", "cosine"]),
    start=st.floats(0, 10),
    end=st.floats(0, 10),
    after=st.floats(0, 0.9),
    share=st.floats(0.05, 1),
    steps=st.integers(1, 50),
)
def test_it_goes_one_way_from_start_to_end(kind, start, end, after, share, steps):
    schedule = Schedule(schedule=kind, start=start, end=end, after=after, over=share * (1 - after))
    weights = [schedule.at(step, steps) for step in range(steps)]
    assert weights[0] == start
    assert steps == 1 or weights[-1] == pytest.approx(end)
    assert weights == sorted(weights, reverse=end < start)
    assert max(weights) <= highest(schedule) + 1e-9


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{schedule: linear, start: 0}", "a linear weight needs `end`"),
        ("{schedule: constant, start: 0, over: 0.5}", "a constant weight has no over"),
        ("{schedule: cosine, start: 0, end: 1, after: 0.6, over: 0.6}", "are more than all steps"),
        ("{schedule: cosin, start: 0, end: 1}", r"'lambda_vsd.schedule': input should be 'constant'"),
        ("{schedule: linear, start: 0, end: -1}", r"'lambda_vsd.end': .* greater than or equal to 0"),
        ("{schedule: linear, star: 0, start: 0, end: 1}", r"'lambda_vsd.star' \(did you mean 'start'\?\)"),
        ("many", r"'lambda_vsd': a weight is a number, or a schedule: \{schedule: linear"),
        ("linear", r"'lambda_vsd': a weight is a number, or a schedule: \{schedule: linear"),
        ([0, 1], r"'lambda_vsd': a weight is a number, or a schedule: \{schedule: linear"),
        ("-0.5", "'lambda_vsd': input should be greater than or equal to 0"),
    ],
)
def test_what_is_no_weight_is_a_mistake_of_its_own(settings, said, message):
    with pytest.raises(CachekdError, match=message):
        read_config(None, TrainConfig, settings | {"lambda_vsd": said})


def test_what_a_schedule_lacks_is_not_the_option(settings):
    with pytest.raises(CachekdError, match=r"'lambda_vsd.schedule': field required") as caught:
        read_config(None, TrainConfig, settings | {"lambda_vsd": "{start: 0, end: 1}"})
    assert caught.value.fix is None


def test_a_weight_is_recorded_as_it_was_said(settings, tmp_path):
    file = tmp_path / "run.yaml"
    values = {name: str(value) if name == "out" else value for name, value in settings.items()}
    file.write_text(json.dumps(values | {"lambda_align": MIDDLE, "lambda_vsd": 2}))
    config = read_config(file, TrainConfig, {})
    typed = read_config(None, TrainConfig, settings | {"lambda_align": json.dumps(MIDDLE), "lambda_vsd": "2"})
    assert config == typed
    noted = json.loads(json.dumps(config.deciding()))
    assert (noted["lambda_align"], noted["lambda_vsd"]) == (MIDDLE | {"start": 0.0, "end": 2.0}, 2.0)
    assert TrainConfig(**noted, out=config.out) == config
    assert written(config.weights["align"]) == "linear 0 to 2 after 0.25 over 0.5"


def test_a_term_is_on_if_its_weight_is_ever_above_0(settings):
    never = {"schedule": "linear", "start": 0, "end": 0}
    assert TrainConfig(**settings, lambda_align=never, lambda_vsd=MIDDLE).terms == ("ce", "vsd")
    with pytest.raises(CachekdError, match="lambda_vsd linear 0 to 2"):
        TrainConfig(**settings, lambda_vsd=MIDDLE, trainable="projector")


def steps_of(config: TrainConfig) -> list[dict]:
    entries = json.loads((config.out / RUN_FILE).read_text())["log"]
    return [entry for entry in entries if "loss" in entry]


def test_a_run_has_each_steps_weight_and_a_term_of_weight_0_is_not_computed(settings):
    config = TrainConfig(**settings | {"epochs": 3}, lambda_align=MIDDLE, lambda_vsd=COSINE)
    train(config)
    steps = steps_of(config)
    assert len(steps) == 9
    assert [step["lambda_align"] for step in steps] == [0, 0, 0, 0.5, 1, 1.5, 2, 2, 2]
    assert ["align" in step for step in steps] == [False] * 3 + [True] * 6
    for step in steps:
        weighted = step["lambda_align"] * step.get("align", 0) + step["lambda_vsd"] * step["vsd"]
        assert step["loss"] == pytest.approx(step["ce"] + weighted, rel=1e-4)
    run = read_run(config.out)
    align = next(term for term in term_shares(run)["terms"] if term["label"] == "L_Align")
    assert align["weight"] == "linear 0 to 2 after 0.25 over 0.5"
    assert align["ends"][-1][0] == pytest.approx(2 * steps[-1]["align"])
    assert "linear 0 to 2" in build_report(run, [])


def test_it_goes_on_where_it_was_whatever_the_batches_are(settings, tmp_path):
    """Stopped after four steps and gone on with; and in halves of batches."""
    settings = settings | {"epochs": 3, "lambda_align": MIDDLE, "lambda_vsd": COSINE}
    whole, cut, halves = (settings | {"out": tmp_path / name} for name in ("whole", "cut", "halves"))
    train(TrainConfig(**whole))
    asked = iter([0, 0, 0, 15])
    with pytest.raises(RunStopped):
        train(TrainConfig(**cut), asked_to_stop=lambda: next(asked))
    assert train(TrainConfig(**cut)).resumed_from == 4
    train(TrainConfig(**halves | {"batch_size": 2, "gradient_accumulation": 2}))
    steps, after, accumulated = (steps_of(TrainConfig(**one)) for one in (whole, cut, halves))
    for one, other in zip(steps, after, strict=True):
        assert (one["loss"], one["lambda_align"]) == (other["loss"], other["lambda_align"])
    weights = [(step["lambda_align"], step["lambda_vsd"]) for step in steps]
    assert [(step["lambda_align"], step["lambda_vsd"]) for step in accumulated] == weights
    students = [
        load_model(str(one["out"]), dtype=torch.float32, device=torch.device("cpu")).state_dict()
        for one in (whole, cut)
    ]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


def test_evaluations_can_be_compared(settings):
    """Each has the weights of the last step."""
    held_out = {"eval_data": settings["data"], "eval_cache": settings["cache"], "eval_steps": 3}
    config = TrainConfig(**settings | held_out, lambda_align=MIDDLE, lambda_vsd=0)
    train(config)
    entries = json.loads((config.out / RUN_FILE).read_text())["log"]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    assert len(evaluations) == 2
    for entry in evaluations:
        assert entry["eval_loss"] == pytest.approx(entry["eval_ce"] + 2 * entry["eval_align"])


def test_what_begins_at_0_is_tried_before_the_first_step_and_estimated(settings, tmp_path):
    config = TrainConfig(**settings, lambda_vsd={"schedule": "linear", "start": 0, "end": 1})
    assert _quiet(config).lambda_vsd == 1
    trainer = make_trainer(config, tmp_path / "t")
    batch = collate_with_targets([trainer.train_dataset[index] for index in range(2)], 0)
    assert "vsd" not in trainer.terms_of(trainer.model, batch).terms
    assert "vsd" in trainer.terms_of(trainer.model, batch, evaluating=True).terms
    tried, loss = [], trainer.terms.losses["vsd"]
    trainer.terms.losses["vsd"] = lambda *args: tried.append(args) or loss(*args)
    prove_gradients(trainer)
    assert len(tried) == 1
