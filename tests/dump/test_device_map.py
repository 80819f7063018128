"""A teacher that does not fit: with layers on the disk, dumps and evaluations are those of the whole one."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from cachekd.config import DumpConfig
from cachekd.dump import dump
from cachekd.dump import run as dump_run
from cachekd.errors import CachekdError
from cachekd.evaluate import run as eval_run
from cachekd.models import load_model
from cachekd.models.placement import is_offloaded, layers_of
from cachekd_cli.main import app
from caches import files_of
from placements import just_enough, layers_on_disk
from tiny import evaluated


@pytest.fixture(scope="module")
def tight(teacher_path) -> str:
    """Memory for the teacher with one of its layers."""
    teacher = load_model(str(teacher_path), dtype=torch.float32, device=torch.device("cpu"))
    return f"cpu={just_enough(teacher)}B"


def test_a_dump_with_layers_on_the_disk_has_the_same_bytes(
    tmp_path, teacher_path, data_path, tight, monkeypatch
):
    teachers, load = [], dump_run.load_teacher
    monkeypatch.setattr(
        dump_run, "load_teacher", lambda *a, **k: teachers.append(load(*a, **k)) or teachers[-1]
    )
    settings = {"teacher": str(teacher_path), "data": str(data_path), "batch_size": 4, "shard_samples": 4}
    dump(DumpConfig(**settings, out=tmp_path / "whole"))
    dump(DumpConfig(**settings, out=tmp_path / "split", device_map="auto", max_memory=tight))
    whole, split = (teacher.model for teacher in teachers)
    layers = [is_offloaded(layer) for layer in layers_of(split).values()]
    assert any(layers)
    assert not all(layers)
    assert not is_offloaded(whole)
    assert files_of(tmp_path / "split") == files_of(tmp_path / "whole")

    # One that was begun with the whole teacher is gone on with, and is the same.
    half = settings | {"out": tmp_path / "half", "world_size": 2}
    assert not dump(DumpConfig(**half, rank=0)).finished
    on_disk = layers_on_disk(tmp_path, whole)
    assert dump(DumpConfig(**half, rank=1, device_map=on_disk)).finished
    assert all(is_offloaded(layer) for layer in layers_of(teachers[-1].model).values())
    assert files_of(tmp_path / "half") == files_of(tmp_path / "whole")


def test_an_evaluation_with_layers_on_the_disk_has_the_same_scores(
    tmp_path, teacher_path, student_path, data_path, tight, monkeypatch
):
    runners = []

    class Runner(eval_run.QuestionRunner):
        def __init__(self, model, *args, **settings):
            runners.append(is_offloaded(model))
            super().__init__(model, *args, **settings)

    monkeypatch.setattr(eval_run, "QuestionRunner", Runner)
    settings = {"models": [student_path], "data": str(data_path), "teacher": str(teacher_path)}
    expected = evaluated(**settings)
    found = evaluated(**settings, device_map="auto", max_memory=tight)
    assert runners == [False, False, True, False]  # the student is smaller, and fits
    assert found == expected

    # A file names the teacher's layers, of which the student has fewer.
    teacher = load_model(str(teacher_path), dtype=torch.float32, device=torch.device("cpu"))
    assert evaluated(**settings, device_map=layers_on_disk(tmp_path, teacher)) == expected
    assert runners[4:] == [True, False]
    alone = {"models": [student_path], "data": str(data_path), "device_map": "map.yaml"}
    with pytest.raises(CachekdError, match="a device map from a file is for the teacher alone"):
        evaluated(**alone)


def test_a_teacher_with_layers_on_the_disk_is_asked_again(
    tmp_path, cache_path, teacher_path, data_path, tight
):
    def verify(*options: object):
        return CliRunner().invoke(app, ["verify", str(cache_path), *map(str, options)])

    again = ("--teacher", teacher_path, "--data", data_path, "--sample", 4)
    whole, split = verify(*again, "--json"), verify(*again, "--max-memory", tight, "--json")
    assert json.loads(whole.stdout)["ok"]
    assert split.stdout == whole.stdout
    alone = verify("--device-map", "auto", "--max-memory", tight).exception
    assert isinstance(alone, CachekdError)
    assert "--device-map and --max-memory are for asking the teacher again" in str(alone)
    wrong = verify(*again, "--max-memory", "much").exception
    assert isinstance(wrong, CachekdError)
    assert "0=20GB,cpu=60GB" in str(wrong)
