"""What only a GPU shows: its own rounding, page-locked memory, how much memory, and processes beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from cachekd.config import TrainConfig
from cachekd.models.device import peak_memory, reset_peak
from cachekd.train import train
from cachekd.train.open import make_trainer
from caches import dump_cache, write_data
from runs import losses
from tiny import with_long_ones

pytestmark = pytest.mark.gpu

BFLOAT16 = 0.03  # the share by which a loss in bfloat16 may differ from that in float32


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 8)


@pytest.fixture(scope="module")
def cache(gpu, tmp_path_factory, teacher_path, data) -> Path:
    return dump_cache(tmp_path_factory.mktemp("gpu") / "cache", teacher_path, data, tail="exact")


@pytest.fixture
def settings(gpu, tmp_path, student_path, teacher_path, data, cache) -> dict[str, Any]:
    paths = {"student": student_path, "teacher": teacher_path, "data": data, "cache": cache}
    rest = {"out": tmp_path / "run", "batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "workers": 0}
    return {name: str(path) for name, path in paths.items()} | rest


def trained(settings: dict[str, Any], name: str, **changed: Any) -> list[tuple[float, ...]]:
    config = TrainConfig(**settings | {"out": settings["out"].with_name(name)} | changed)
    train(config)
    return losses(config.out)


def test_bfloat16_is_the_default_and_near_float32(settings, gpu):
    """By autocast: the weights stay float32."""
    trainer = make_trainer(TrainConfig(**settings), settings["out"])
    assert trainer.args.bf16
    assert {p.dtype for p in trainer.vlm.parameters()} == {torch.float32}
    assert trainer.teacher.model.dtype == torch.bfloat16
    half, whole = trained(settings, "half"), trained(settings, "whole", dtype="float32")
    for ours, theirs in zip(half, whole, strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=BFLOAT16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_teaches_what_a_live_teacher_does(settings, gpu, tmp_path, data, teacher_path, dtype):
    own = dump_cache(tmp_path / "own", teacher_path, data, tail="exact", dtype=dtype)
    cached = trained(settings, "cached", cache=own, dtype=dtype)
    live = trained(settings, "live", cache=None, live_teacher=True, dtype=dtype)
    for ours, theirs in zip(cached, live, strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-2)
        assert ours[2:] == pytest.approx(theirs[2:], rel=0.1, abs=1e-3)


def test_batches_come_from_page_locked_memory_without_blocking(settings, gpu):
    trainer = make_trainer(TrainConfig(**settings), settings["out"])
    assert trainer.args.dataloader_pin_memory
    assert trainer.accelerator.non_blocking
    batch = trainer.feed.collate([trainer.train_dataset[0], trainer.train_dataset[1]])
    pinned = batch.pin_memory()
    found = [*pinned.student.tensors.values(), pinned.targets.ids, pinned.targets.logprobs]
    assert all(tensor.is_pinned() for tensor in found)
    moved = pinned.to(gpu.device, non_blocking=True)
    for name, tensor in batch.student.tensors.items():
        assert torch.equal(moved.student.tensors[name].cpu(), tensor)
    assert torch.equal(moved.targets.ids.cpu(), batch.targets.ids)
    first = next(iter(trainer.get_train_dataloader()))
    assert first.student.supervised.device == gpu.device


def test_workers_can_be_spawned_beside_a_gpu_in_use(settings, gpu, monkeypatch):
    torch.ones(1, device=gpu.device)

    plain = DataLoader.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("num_workers"):
            kwargs["multiprocessing_context"] = "spawn"
        plain(self, *args, **kwargs)

    alone = trained(settings, "alone")
    monkeypatch.setattr(DataLoader, "__init__", init)
    beside = trained(settings, "beside", workers=1)
    gpu.assert_close(beside, alone)


def test_recomputing_layers_needs_less_memory(settings, gpu, tmp_path, capsys):
    data = with_long_ones(tmp_path / "data", 16, tuple(range(16)))
    common = {"data": str(data), "cache": None, "teacher": None, "lambda_align": 0, "lambda_vsd": 0}
    common |= {"batch_size": 16, "max_tokens": 500, "too_long": "cut", "logit_chunk": 256}
    peaks = {}
    for recompute in (True, False):
        torch.cuda.empty_cache()
        reset_peak()
        out = settings["out"].with_name(f"run-{recompute}")
        train(TrainConfig(**settings | common | {"out": out, "gradient_checkpointing": recompute}))
        peaks[recompute] = peak_memory() / 1e6
    with capsys.disabled():
        print(f"\npeak, layers recomputed or not: {peaks[True]:.1f}, {peaks[False]:.1f} MB")
    assert peaks[True] < 0.9 * peaks[False]
