"""A step's memory as `cachekd check` computes it from the configurations, beside what a step really takes.

    python benchmarks/memory_by_part.py
    python benchmarks/memory_by_part.py --how bfloat16
    python benchmarks/memory_by_part.py --how adapters --json

Two LLaVAs of some 14 and 29 million weights on a CPU; each run in a process of its own. What counts is the
peak beyond what the process held when training began, but for the weights. glibc is told to give back what is
freed: by itself it keeps blocks of up to 32 MB, here some 300 MB of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from apart import apart, resident
from rich.console import Console
from rich.table import Table
from small_vlm import CPU, Examples, Text, Tower, lean_trainer, random_samples, save_vlm
from torch import nn
from train_memory import cached_targets
from transformers import TrainerCallback
from transformers.utils import logging

from cachekd.check.memory import StepMemory, StepSetting, step_memory
from cachekd.models import ModelFiles, SwitchedTeacher, load_config, load_model
from cachekd.models.adapters import with_adapters
from cachekd.models.device import reset_peak
from cachekd.train.arguments import CHECKPOINTING
from cachekd.train.batch import Example
from cachekd.train.teacher import recompute_frozen_layers

VOCAB, BATCH, LENGTH = 4096, 4, 192
TOWER = Tower(layers=4, width=256, image=64)
TEACHER, STUDENT = Text(layers=8, width=512, heads=4), Text(layers=6, width=384, heads=4)
# How the student trains: in whole, in float32; its weights in bfloat16; adapters on them, with a teacher in
# four bits.
HOW = {
    "float32": StepSetting(BATCH, None),
    "bfloat16": StepSetting(BATCH, torch.bfloat16, torch.bfloat16),
    "adapters": StepSetting(
        BATCH,
        torch.bfloat16,
        torch.bfloat16,
        lora={"r": 16, "target_modules": "all-linear"},
        teacher_bits=4,
    ),
}
_M_MMAP_THRESHOLD, _M_MMAP_MAX = -3, -4


class _Began(TrainerCallback):
    """Notes what there is when training begins."""

    resident = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        reset_peak()
        self.resident = resident("VmRSS")


def prepare(folder: Path) -> None:
    """Both models, and what a cache would hold."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for seed, (name, text) in enumerate((("teacher", TEACHER), ("student", STUDENT))):
        save_vlm(folder / name, VOCAB, TOWER, text, seed=seed)
    teacher = load_model(str(folder / "teacher"), dtype=torch.float32, device=CPU)
    targets = [cached_targets(teacher, sample) for sample in random_samples(BATCH, LENGTH, VOCAB, TOWER)]
    torch.save(targets, folder / "targets.pt")


def computed(folder: Path, how: str) -> dict[bool, StepMemory]:
    """Without any weights."""
    [sample] = random_samples(1, LENGTH, VOCAB, TOWER)
    student, teacher = (load_config(str(folder / name)) for name in ("student", "teacher"))
    return step_memory(student, teacher, sample, HOW[how])


def measured(folder: Path, how: str, recomputed: bool) -> int:
    """Bytes of two steps at the peak, beyond what the process held but for the weights."""
    setting = HOW[how]
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
    libc.mallopt(_M_MMAP_MAX, 2**20)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    files, began = ModelFiles(folder / "teacher"), _Began()
    quantization = None if setting.teacher_bits is None else f"{setting.teacher_bits}bit"
    dtype = setting.half or torch.float32
    teacher = SwitchedTeacher(files.load(dtype=dtype, device=CPU, tower=False, quantization=quantization))
    if recomputed:
        recompute_frozen_layers(teacher.model)
    student: nn.Module = load_model(str(folder / "student"), dtype=setting.student_dtype, device=CPU)
    if setting.lora is not None:
        student = with_adapters(student, setting.lora)
    targets = torch.load(folder / "targets.pt", weights_only=False)
    data = random_samples(BATCH, LENGTH, VOCAB, TOWER)
    if setting.half is not None:  # what the library loads for its first product in this dtype is no step's
        with torch.autocast("cpu", setting.half):
            nn.Linear(256, 256)(torch.randn(256, 256, requires_grad=True)).sum().backward()
    trainer = lean_trainer(
        student,
        Examples([Example(encoded, target) for encoded, target in zip(data, targets, strict=True)], 2),
        folder / "out",
        batch=BATCH,
        settings={"use_cpu": True, CHECKPOINTING: recomputed, "bf16": setting.half is not None},
        callbacks=[began],
        weights={"align": 1.0, "vsd": 1.0},
        teacher=teacher,
    )
    trainer.train()
    weights = sum(p.nbytes for model in (student, teacher.model) for p in model.parameters())
    return resident("VmHWM") - began.resident + weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--how", choices=HOW, default="float32", help="float32 (default), bfloat16, adapters")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart(prepare, folder)
        rows = [
            {"recomputed": kind, "measured": apart(measured, folder, options.how, kind), **asdict(parts)}
            for kind, parts in apart(computed, folder, options.how).items()
        ]
    if options.json:
        print(json.dumps(rows))
        return
    table = Table("MB", "layers kept", "layers recomputed")
    for part in rows[0]:
        if part != "recomputed":
            table.add_row(part, *(f"{row[part] / 1e6:,.1f}" for row in rows))
    Console().print(table)


if __name__ == "__main__":
    main()
