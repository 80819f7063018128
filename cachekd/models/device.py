"""The device that models run on: a GPU of any maker that torch knows, else the CPU.

This is the one module that asks torch what there is. Everything else asks here.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

_RESET_PEAK = Path("/proc/self/clear_refs")


def accelerator() -> torch.device | None:
    """The kind of GPU that there is (CUDA, MPS, XPU, ...); None where there is only a CPU, or where
    `accelerate launch --cpu`, or its variable, says that the CPU is meant."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return None
    return torch.accelerator.current_accelerator(check_available=True)


def default_device() -> torch.device:
    """The GPU if there is one; of several, the one that torchrun, accelerate or Slurm means for us."""
    if (found := accelerator()) is None:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return torch.device(found.type, local_rank % torch.accelerator.device_count())


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU (where half precision is slow and less exact)."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a setting names.

    Args:
        name: of torch, or "auto": the device's default.
    """
    return default_dtype(device) if name == "auto" else getattr(torch, name)


def synchronize() -> None:
    """Wait until the GPU has done what it was given; a CPU has."""
    if accelerator() is not None:
        torch.accelerator.synchronize()


def free_memory() -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    if (found := accelerator()) is not None:
        torch.get_device_module(found).empty_cache()


def reset_peak() -> bool:
    """Have `peak_memory` begin anew, where the system can; returns whether it could."""
    module = _with_a_peak()
    if module is not None:
        for index in range(module.device_count()):
            module.reset_peak_memory_stats(index)
        return True
    try:
        _RESET_PEAK.write_text("5")
    except OSError:  # another system than Linux, or one that does not let us
        return False
    return True


def peak_memory() -> int:
    """Bytes: the most that was in use since `reset_peak`, of the GPU if there is one, else of the process. Of
    several GPUs the sum of their peaks: of one that this process does not use, 0."""
    module = _with_a_peak()
    if module is not None:
        return sum(int(module.max_memory_allocated(index)) for index in range(module.device_count()))
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this peak can be reset
        return next(1024 * int(line.split()[1]) for line in status.open() if line.startswith("VmHWM"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _with_a_peak() -> Any:
    """The GPU's module of torch, if it counts its memory (MPS does not)."""
    found = accelerator()
    module = None if found is None else torch.get_device_module(found)
    return module if hasattr(module, "max_memory_allocated") else None
