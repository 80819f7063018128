"""The training steps that `benchmarks/gpu.py` measures."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from clock import Clock, Timed
from gpu_lab import Found, Lab
from small_vlm import Naive, lean_trainer
from torch.profiler import profile
from transformers import TrainerCallback

from cachekd.cache import LogitCache
from cachekd.models import LiveTeacher, SwitchedTeacher
from cachekd.models.device import free_memory, peak_memory, reset_peak, synchronize
from cachekd.models.loading import _empty_tower
from cachekd.train.arguments import CHECKPOINTING
from cachekd.train.data import TrainingSamples
from cachekd.train.teacher import recompute_frozen_layers

STEPS = 6  # the first counts FLOPs, the second warms up
STEP_WEIGHTS = {
    "live": {"align": 1.0, "vsd": 1.0},
    "cached": {"align": 1.0, "vsd": 1.0},
    "cached_no_vsd": {"align": 1.0},
    "ce": {},
}


def naive(lab: Lab) -> Found:
    """A step of two whole models, logits of every position, as anyone would first write it."""
    encoder = lab.files["student"].encoder
    data = [encoder(lab.samples[index]) for index in range(lab.sizes.step_batch)]
    half = None if lab.dtype == torch.float32 else lab.dtype
    lab.student.train()
    stepper, clock = Naive(lab.student, lab.teacher, data, autocast=half), Clock(lab.device)
    reset_peak()
    clock.begin()
    try:
        for _ in range(STEPS):
            loss = stepper.loss()
            loss.backward()
            clock.before_update()
            stepper.update()
            loss.item()
            clock.end()
        return _timed(lab, clock)
    finally:
        clock.before_update()
        lab.student.zero_grad()


def step(
    lab: Lab, name: str, *, recomputed: bool = False, watch: list[TrainerCallback] | None = None
) -> Found:
    """A step of cachekd's own trainer, reading the data set and the cache as a run does.

    Args:
        name: in `STEP_WEIGHTS`.
        recomputed: with gradient checkpointing.
        watch: instead of the clock.
    """
    on_gpu, half = lab.device.type != "cpu", lab.dtype == torch.bfloat16
    teacher = SwitchedTeacher(lab.teacher) if name in ("live", "cached") else None
    live = LiveTeacher(teacher, lab.sizes.vocab) if teacher and name == "live" else None
    cache = LogitCache(lab.config.out) if name.startswith("cached") else None
    clock = Clock(lab.device)
    settings = {
        "use_cpu": not on_gpu,
        "bf16": half,
        "max_steps": STEPS,
        "logging_steps": STEPS,
        "report_to": [],
        "dataloader_num_workers": min(4, lab.workers),
        "dataloader_persistent_workers": lab.workers > 0,
        "dataloader_pin_memory": on_gpu,
        "accelerator_config": {"non_blocking": on_gpu},
    }
    if recomputed:
        settings |= {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    reset_peak()
    trainer = lean_trainer(
        lab.student,
        TrainingSamples(lab.samples, lab.files["student"].encoder, cache),
        lab.folder / "out",
        batch=lab.sizes.peak_batch if recomputed else lab.sizes.step_batch,
        settings=settings,
        callbacks=[Timed(clock)] if watch is None else watch,
        teacher=teacher,
        live=live,
        weights=STEP_WEIGHTS[name],
    )
    computed = set[torch.dtype]()
    layer = lab.student.model.language_model.layers[0].mlp
    watched = layer.register_forward_hook(lambda _module, _inputs, output: computed.add(output.dtype))
    try:
        trainer.train()
        wanted = lab.dtype if lab.student.dtype == torch.float32 else lab.student.dtype
        if computed != {wanted}:
            raise RuntimeError(f"the student computed in {computed}, not in {wanted}")
        found = {} if watch is not None else _timed(lab, clock)
        return found | {"wait_share": trainer.data_wait.total.share}
    finally:
        watched.remove()
        clock.before_update()
        # Accelerate's, around the model's own forward; and that it was there, or the next has no autocast.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(lab.student).pop(name, None)
        lab.student.zero_grad()


def _timed(lab: Lab, clock: Clock) -> Found:
    seconds = statistics.median(clock.wall[1:])
    found = {"ms": 1e3 * seconds, "tflop": clock.flops / 1e12} | lab.rate(clock.flops, seconds)
    return found | {"peak_gb": peak_memory() / 1e9}


def profiled(lab: Lab, path: Path) -> Found:
    """Where a cached step's time goes, written to a file; and how often it waits for the device."""
    watch = _Watch(lab, path)
    step(lab, "cached", watch=[watch])
    return watch.found | {"table": str(path)}


class _Watch(TrainerCallback):
    """The third step under the profiler, the fourth under torch's own eye for waits."""

    def __init__(self, lab: Lab, path: Path) -> None:
        self.lab, self.path, self.found = lab, path, Found()
        self._profiler, self._waits = profile(record_shapes=False), list[warnings.WarningMessage]()
        self._caught: Any = None

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == 2:
            synchronize()
            self._profiler.__enter__()
        if state.global_step == 3 and self.lab.device.type == "cuda":
            self._caught = warnings.catch_warnings(record=True)
            self._waits = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == 3:
            synchronize()
            self._profiler.__exit__(None, None, None)
            events = self._profiler.key_averages()
            whose = f"self_{'cpu' if self.lab.device.type == 'cpu' else 'device'}_time_total"
            self.path.write_text(events.table(sort_by=whose, row_limit=30, max_name_column_width=80))
        if state.global_step == 4 and self._caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            at = Counter(
                f"{Path(found.filename).parent.name}/{Path(found.filename).name}:{found.lineno}"
                for found in self._waits
                if "synchroniz" in str(found.message)
            )
            self.found = {"waits": sum(at.values()), "waits_at": dict(at.most_common())}


def recomputed(lab: Lab) -> Found:
    """A cached step with gradient checkpointing; the teacher without its vision encoder, as a run has it."""
    model = SwitchedTeacher(lab.teacher).model
    if hasattr(model.model.vision_tower, "embeddings"):
        _empty_tower(model.model.vision_tower, ())
    recompute_frozen_layers(model)
    free_memory()
    return step(lab, "cached", recomputed=True)


def half_student(lab: Lab) -> Found:
    """The same with student, gradients and AdamW's moments in bfloat16."""
    lab.student.to(torch.bfloat16)
    return recomputed(lab)
