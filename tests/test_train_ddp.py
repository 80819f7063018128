"""Two processes on a CPU, through `accelerate launch`, against one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import train_in_two_processes
from safetensors.torch import load_file

from cachekd.config import TrainConfig
from cachekd.files import RUN_FILE
from cachekd.train import train


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, student_path, teacher_path, data_path, cache_path):
    """2 x 3 samples a step against 6: the same samples in each step, so the same losses and weights.

    The switched path runs in the first and the last of four steps, in both processes.
    """
    settings = {
        "student": str(student_path),
        "teacher": str(teacher_path),
        "data": str(data_path),
        "cache": str(cache_path),
        "epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "vsd_every": 3,
        # As large as the steps are: Adam divides a gradient by its own size, and rounding with it.
        "training": {"optim": "sgd"},
    }
    train(TrainConfig(**settings, batch_size=6, out=tmp_path / "one"))
    recipe = tmp_path / "two.yaml"
    recipe.write_text(json.dumps(settings | {"batch_size": 3, "out": str(tmp_path / "two")}))
    done = train_in_two_processes(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wall time") == 1  # the first process prints, the other is quiet

    def entries(out: Path) -> list[dict]:
        return [entry for entry in json.loads((out / RUN_FILE).read_text())["log"] if "ce" in entry]

    one, two = entries(tmp_path / "one"), entries(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in {"ce", "align", "vsd", "grad_norm"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    assert ["vsd" in entry for entry in two] == [True, False, False, True]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    start = load_file(Path(student_path) / "model.safetensors")
    moved = max((weights[0][name] - start[name]).abs().max() for name in start)
    assert moved > 1e-4
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-3 * float(moved))
