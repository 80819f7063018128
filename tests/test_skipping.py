"""What the dump left out, or what is broken, is left out of training and evaluations: counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tar_members, write_tar

from cachekd.cache import LogitCache
from cachekd.config import TrainConfig
from cachekd.files import RUN_FILE
from cachekd.losses import cross_entropy_loss, dbild_loss
from cachekd.sample_order import RandomOrder
from cachekd.samples import SampleEncoder, collate, open_samples, predicting_positions
from cachekd.train import train
from cachekd.vlm import load_model, load_processor, logits_at

CPU = torch.device("cpu")
BROKEN = (1, 4, 6, 9)  # of 12; with this seed one batch of two has nothing else


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The samples that `cache_path` has, some pictures broken since."""
    members = tar_members(12)
    for index in BROKEN:
        members[2 * index] = (members[2 * index][0], b"not a png")
    return write_tar(tmp_path_factory.mktemp("broken-since") / "0.tar", members)


@pytest.fixture
def settings(student_path, teacher_path, cache_path, broken) -> dict[str, Any]:
    return {
        "student": str(student_path),
        "teacher": str(teacher_path),
        "cache": str(cache_path),
        "data": str(broken),
        "batch_size": 2,
        "epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "on_error": "skip",
        # As large as the steps are: Adam divides a gradient by its own size, and rounding with it.
        "training": {"optim": "sgd", "lr_scheduler_type": "constant"},
        "warmup": 0.0,
        "max_grad_norm": 0.0,
    }


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / RUN_FILE).read_text())


def batches_of(epoch: int, size: int) -> list[list[int]]:
    order = list(RandomOrder(12, seed=0, epoch=lambda: epoch))
    return [order[start : start + size] for start in range(0, 12, size)]


def reference(settings: dict[str, Any], in_a_step: int) -> dict[str, torch.Tensor]:
    """The student's weights after plain descent over the good samples of each step, one sample at a time.

    Whole models, whole logits, no Trainer. A step's loss is the mean over the answer tokens that are there.
    """
    student = load_model(settings["student"], dtype=torch.float32, device=CPU)
    teacher = load_model(settings["teacher"], dtype=torch.float32, device=CPU).requires_grad_(False)
    teacher.model.vision_tower = student.model.vision_tower
    samples, cache = open_samples(settings["data"]), LogitCache(settings["cache"])
    encoder = SampleEncoder(load_processor(settings["student"]))
    weights = list(student.parameters())
    for step in (some for epoch in range(settings["epochs"]) for some in batches_of(epoch, in_a_step)):
        total, tokens = torch.zeros(()), 0
        for index in step:
            if index in BROKEN:
                continue
            batch = collate([encoder(samples[index])], 0)
            supervised = batch.pop("supervised")
            targets, positions = cache[samples.keys[index]], predicting_positions(supervised)
            kneedle = {"window": targets.window, "min_k": targets.min_k, "reduction": "sum"}
            own, switched = (logits_at(model, batch, positions) for model in (student, teacher))
            total = total + cross_entropy_loss(own, targets.token_ids, reduction="sum")
            for logits in (own, switched):
                total = total + dbild_loss(
                    logits[:, : targets.vocab_size], targets, temperature=3.0, **kneedle
                )
            tokens += len(targets.token_ids)
        if tokens:
            gradients = torch.autograd.grad(total / tokens, weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight.data -= settings["learning_rate"] * gradient
    return student.state_dict()


def assert_close(out: Path, expected: dict[str, torch.Tensor], start: Path) -> None:
    found = load_model(str(out), dtype=torch.float32, device=CPU).state_dict()
    before = load_model(str(start), dtype=torch.float32, device=CPU).state_dict()
    moved = max(float((expected[name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-4
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-3 * moved, msg=name)


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_training_without_broken_samples_is_that_over_the_others(settings, tmp_path, accumulation, workers):
    """Steps of the same samples less the broken ones, one of them with nothing left."""
    empty = [set(batch) <= {*BROKEN} for epoch in range(2) for batch in batches_of(epoch, 2)]
    assert any(empty)
    settings |= {"gradient_accumulation": accumulation, "workers": workers, "out": tmp_path / "run"}
    summary = train(TrainConfig(**settings))
    assert summary.steps == 12 // accumulation
    assert_close(tmp_path / "run", reference(settings, 2 * accumulation), settings["student"])
    keys = {f"s{index:03d}" for index in BROKEN}
    assert (summary.bad.samples, set(summary.bad.first)) == (4, keys)  # each once, in two epochs
    assert "cannot be read" in summary.bad.first["s001"]
    assert record_of(tmp_path / "run")["left_out"] == {
        "missing": {"samples": 0, "first": {}},
        "bad": {"samples": 4, "first": summary.bad.first},
    }
