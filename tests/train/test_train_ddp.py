"""Two processes on a CPU, through `accelerate launch`, against one."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.paths import RUN_FILE
from cachekd.train import train
from cachekd.train.folder import CHECKPOINTS
from launch import launched, train_in_two_processes


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, student_path, teacher_path, data_path, cache_path):
    """2 x 3 samples a step against 6: the same samples in each step, so the same losses and weights.

    The switched path runs in every third of six steps, in both processes. Resumed in the middle of the second
    epoch, both go on with its other half and with the third: the same steps again. A weight has a schedule,
    and the two look at each term's gradient, which changes nothing.
    """
    settings = {
        "student": str(student_path),
        "teacher": str(teacher_path),
        "data": str(data_path),
        "cache": str(cache_path),
        "epochs": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "vsd_every": 3,
        "lambda_align": {"schedule": "linear", "start": 1, "end": 0.5},
        "save_steps": 3,
        "keep_checkpoints": True,
        # As large as the steps are: Adam divides a gradient by its own size, and rounding with it.
        "training": {"optim": "sgd"},
    }
    train(TrainConfig(**settings, batch_size=6, out=tmp_path / "one"))
    recipe = tmp_path / "two.yaml"
    of_two = {"batch_size": 3, "workers": 1, "log_term_gradients": True, "out": str(tmp_path / "two")}
    recipe.write_text(json.dumps(settings | of_two))
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wall time") == 1  # the first process prints, the other is quiet
    whole = json.loads((tmp_path / "two" / RUN_FILE).read_text())
    # As a run that was killed after its third step leaves it.
    (tmp_path / "two" / RUN_FILE).unlink()
    shutil.rmtree(tmp_path / "two" / CHECKPOINTS / "checkpoint-6")
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = json.loads((tmp_path / "two" / RUN_FILE).read_text())
    assert (whole["resumed_from"], resumed["resumed_from"]) == (0, 3)

    def entries(run: dict) -> list[dict]:
        return [entry for entry in run["log"] if "ce" in entry]

    one = entries(json.loads((tmp_path / "one" / RUN_FILE).read_text()))
    assert ["vsd" in entry for entry in one] == [True, False, False] * 2
    for two in (entries(whole), entries(resumed)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            gradients = {name for name in b if name.startswith("gradient_")}
            assert {"gradient_ce_projector", "gradient_align_language_model"} <= gradients
            assert ("gradient_vsd_vision_encoder" in gradients) == ("vsd" in b)
            assert a.keys() == b.keys() - gradients
            for name in {"ce", "align", "vsd", "grad_norm", "lambda_align"} & a.keys():
                assert b[name] == pytest.approx(a[name], rel=1e-4), name
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    start = load_file(Path(student_path) / "model.safetensors")
    moved = max((weights[0][name] - start[name]).abs().max() for name in start)
    assert moved > 1e-4
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-3 * float(moved))


@pytest.mark.slow
def test_two_processes_share_batches_by_tokens(tmp_path, student_path, unequal_data):
    """Two at a time, as one process has them in two accumulated steps."""
    settings = {"student": str(student_path), "data": str(unequal_data), "lambda_align": 0, "lambda_vsd": 0}
    settings |= {"epochs": 2, "batch_tokens": 1200, "logging_steps": 1, "save_steps": 0}
    train(TrainConfig(**settings, gradient_accumulation=2, out=tmp_path / "one"))
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps(settings | {"out": str(tmp_path / "two")}))
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / RUN_FILE).read_text()) for name in ("one", "two"))
    assert one["steps"] == two["steps"] == 2 * 5
    ours, theirs = ([entry["ce"] for entry in run["log"] if "ce" in entry] for run in (one, two))
    assert theirs == pytest.approx(ours, rel=1e-4)


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(tmp_path, student_path, data_path):
    """The launcher passes SIGTERM on to both; the same command goes on, in as many processes only."""
    out, recipe = tmp_path / "two", tmp_path / "two.yaml"
    settings = {"student": str(student_path), "data": str(data_path), "out": str(out), "batch_size": 3}
    settings |= {"lambda_align": 0.0, "lambda_vsd": 0.0, "epochs": 30, "save_steps": 2, "logging_steps": 1}
    recipe.write_text(json.dumps(settings))
    process = launched(recipe)
    while not (out / CHECKPOINTS / "checkpoint-2").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told = process.communicate()[1]
    (step,) = re.findall(r"stopped at step (\d+) of 60: the same command goes on from step \1\n", told)
    with pytest.raises(CachekdError, match="another number of processes"):
        train(TrainConfig(**settings))
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((out / RUN_FILE).read_text())
    assert (run["resumed_from"], run["steps"]) == (int(step), 60)
