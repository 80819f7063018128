"""What goes wrong in the middle of training: told apart, and said with what it takes to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.failures import memory_advice, stop_if_gradient_not_finite
from cachekd.train import make_trainer, train

CONFIG = TrainConfig(student="s", teacher="t", cache="c", data="d", out=Path("o"))


@pytest.fixture
def plain(tmp_path, student_path, data_path) -> TrainConfig:
    """L_CE alone."""
    return TrainConfig(
        student=str(student_path),
        data=str(data_path),
        out=tmp_path / "run",
        lambda_align=0,
        lambda_vsd=0,
        batch_size=4,
        learning_rate=1e-3,
    )


# ---- out of memory, and what is not


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("Could not run 'aten::foo' with arguments from the 'CUDA' backend"),
        RecursionError("maximum recursion depth exceeded"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.distributed.DistBackendError("NCCL error: unhandled system error"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_go_on_as_they_are(error):
    with pytest.raises(type(error)) as caught, memory_advice(CONFIG):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "GPU"),
        (torch.AcceleratorError("CUDA error: out of memory"), "GPU"),
        (MemoryError(), "CPU"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: not enough memory"), "CPU"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "CPU"),
    ],
)
def test_every_kind_of_out_of_memory_is_advised_on(error, device):
    with pytest.raises(CachekdError, match="out of memory") as caught, memory_advice(CONFIG):
        raise error
    assert f"on the {device}" in str(caught.value)
    assert "--gradient-checkpointing" in str(caught.value)


# ---- not finite


def test_a_diverged_run_is_told_its_learning_rate_and_largest_weight(plain, recwarn):
    changed = {"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup": 0.0}
    with pytest.raises(CachekdError, match="not finite") as caught:
        train(plain.model_copy(update=changed))
    text = str(caught.value)
    assert "of at most 1e+30" in text
    assert "largest |weight|" in text or "weights are not finite already" in text
    assert "lower --learning-rate" in text
    assert "--dtype float32" not in text  # it is that already
    assert not [w for w in recwarn if "requires_grad=True to a scalar" in str(w.message)]


class Poison(TrainerCallback):
    """One gradient is NaN; the loss was finite."""

    def __init__(self) -> None:
        self.trainer = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            norm = torch.tensor(float("nan"))
            stop_if_gradient_not_finite(self.trainer, norm, ["a", "b"])
        stop_if_gradient_not_finite(self.trainer, torch.tensor(3.0))


def test_a_gradient_that_is_not_finite_stops_before_the_step(plain, tmp_path):
    poison = Poison()
    trainer = make_trainer(plain, tmp_path / "trainer", [poison])
    poison.trainer = trainer
    with pytest.raises(CachekdError, match="the gradient is not finite") as caught:
        trainer.train()
    text = str(caught.value)
    assert "step 2, samples 'a', 'b'" in text
    assert "of at most 0.001" in text
    assert "largest |weight|" in text
    assert "look at these samples" in text
    (path,) = (tmp_path / "trainer").glob("not-finite*.pt")
    assert str(path) in text
    saved = torch.load(path, weights_only=False)
    assert (saved["step"], saved["keys"]) == (1, ["a", "b"])
    assert all(torch.equal(saved["student"][name], x) for name, x in trainer.vlm.state_dict().items())


def test_no_file_of_weights_that_are_broken_already(plain, tmp_path):
    trainer = make_trainer(plain, tmp_path / "trainer")
    next(iter(trainer.vlm.parameters())).data.view(-1)[0] = float("inf")
    with pytest.raises(CachekdError, match="weights are not finite already") as caught:
        stop_if_gradient_not_finite(trainer, float("inf"))
    assert "step 1\n" in str(caught.value)
    assert "lower --learning-rate" in str(caught.value)
    assert not list(tmp_path.rglob("not-finite*.pt"))
