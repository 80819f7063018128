"""What goes wrong in the middle of training: told apart, and said with what it takes to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.train import train
from cachekd.train.student import memory_advice

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
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.9 GiB, max allowed: 9.0 GiB)"), "GPU"),
        (RuntimeError("Invalid buffer size: 24.00 GiB"), "GPU"),
        (
            RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
            "GPU",
        ),
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
    assert "largest |weight| 1e+30" in text
    assert "lower --learning-rate" in text
    assert "--dtype float32" not in text  # it is that already
    assert not [w for w in recwarn if "requires_grad=True to a scalar" in str(w.message)]
