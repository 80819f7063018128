"""What a training run will need, from a few real steps of it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from cachekd.config import TrainConfig
from cachekd.config.weights import highest
from cachekd.models.device import peak_memory, reset_peak, synchronize
from cachekd.train.arguments import SwitchKDTrainingArguments
from cachekd.train.batch import Batch, Example, batch_of
from cachekd.train.data import TrainingSamples
from cachekd.train.open import load_trainer, open_run
from cachekd.train.order import limits_of_batches
from cachekd.train.size import RunSize, run_size
from cachekd.train.student import memory_advice
from cachekd.train.trainer import SwitchKDTrainer
from cachekd.train.validation import undisturbed

STEPS = 2  # that are timed, at least; the one before them allocates the optimizer's state


@dataclass(frozen=True)
class TrainEstimate:
    """Measured on the first steps, and on one batch of the longest samples.

    Attributes:
        settings: those that memory and time depend on, presets resolved.
        student_parameters, trained_parameters, teacher_parameters: numbers of them.
        bridge_parameters: of the switch bridge; 0 without one.
        memory: bytes at the peak by part: weights, gradients, optimizer state, what the process held before
            the models were loaded (on a GPU its allocator, so next to nothing), and the rest: activations,
            logits and what is read.
        logits_bytes: of one array of logits, counted, not measured: V float32 of every answer token that is
            looked at at a time. A loss holds several such arrays; they are in the rest.
        peak_bytes: of the GPU's allocator; without a GPU, of the whole process. The larger one of the next
            two.
        random_peak_bytes: of the first steps, whose samples are as they come: a lower bound of a run's.
        longest_peak_bytes: of a forward and backward of the longest samples, all in one batch; and of a few
            batches of held-out data, where there are any.
        longest_batch: samples and tokens in it, padding included: what was measured for that.
        seconds_per_step: of the optimizer's steps.
        steps: of the whole run.
        measured_steps: that were run.
        evaluations: on held-out data, in the whole run.
        seconds_per_evaluation: from a few batches of one.
        disk: what the run saves, at most; counted, not measured.
        disk_bytes: of it at the worst moment.
    """

    settings: dict[str, Any]
    student_parameters: int
    trained_parameters: int
    teacher_parameters: int
    bridge_parameters: int
    memory: dict[str, int]
    logits_bytes: int
    peak_bytes: int
    random_peak_bytes: int
    longest_peak_bytes: int
    longest_batch: tuple[int, int]
    seconds_per_step: float
    steps: int
    measured_steps: int
    disk: RunSize
    disk_bytes: int
    evaluations: int = 0
    seconds_per_evaluation: float = 0.0


@dataclass(frozen=True)
class _Peaks:
    """Bytes: before the models were loaded, in random steps, in a batch of the longest samples."""

    before: int
    random: int
    longest: int


class _Stopwatch(TrainerCallback):
    """Stops after a few steps; notes when each ended, and what the optimizer and the gradients hold."""

    def __init__(self, timed: int) -> None:
        self.steps = 1 + timed
        self.ends: list[float] = []
        self.total_steps = self.gradients = self.optimizer = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.total_steps = state.max_steps
        self.ends.append(time.perf_counter())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = sum(_bytes(p.grad) for p in kwargs["model"].parameters() if p.grad is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.ends.append(time.perf_counter())
        states = kwargs["optimizer"].state.values()
        self.optimizer = sum(_bytes(x) for state in states for x in state.values() if torch.is_tensor(x))
        control.should_training_stop = state.global_step >= self.steps
        control.should_evaluate = False


def estimate_training(config: TrainConfig) -> TrainEstimate:
    """Run a few steps of a run and throw them away; `config.out` is not touched, and nothing is reported.

    Raises:
        CachekdError: what `train` raises, out of memory among it.
    """
    # One round of `vsd_every` steps has one with the switched path in it.
    watch = _Stopwatch(max(STEPS, config.vsd_every))
    with tempfile.TemporaryDirectory() as folder, memory_advice(config):
        reset_peak()
        before = peak_memory()
        quiet = _quiet(config)
        opened = open_run(quiet, Path(folder), lambda _: None)
        trainer = load_trainer(quiet, opened, [watch], lambda _: None)
        trainer.train()
        random = peak_memory()
        batch = _longest(trainer)
        reset_peak()
        _run(trainer, batch)
        evaluation = _seconds_per_evaluation(trainer)
        longest = peak_memory()
        args = SwitchKDTrainingArguments.of(config, Path(folder))
    size = run_size(config, args, len(opened.samples), opened.models, opened.cache)
    estimate = _estimate(config, trainer, watch, batch, _Peaks(before, random, longest), size)
    evaluations = _evaluations(args, watch.total_steps)
    return replace(estimate, evaluations=evaluations, seconds_per_evaluation=evaluation)


def _seconds_per_evaluation(trainer: SwitchKDTrainer) -> float:
    """Measure them on its first batches; 0 where nothing is evaluated."""
    validation = trainer.validation
    if validation is None:
        return 0.0
    ends = [time.perf_counter()]
    with undisturbed(trainer):
        for batch in islice(validation.batches(trainer.args), 1 + STEPS):
            validation.sums(trainer, [batch]).tolist()  # waits for the device
            ends.append(time.perf_counter())
    return _seconds_each(ends) * len(validation.part_of(trainer.args))


def _seconds_each(ends: list[float]) -> float:
    """The mean time between them, without the first, which allocates what the others use."""
    durations = [b - a for a, b in pairwise(ends)]
    timed = durations[1:] or durations
    return sum(timed) / len(timed)


def _evaluations(args: TrainingArguments, steps: int) -> int:
    """How many evaluations a run of so many steps has; the last step has one anyway."""
    if args.eval_strategy == IntervalStrategy.NO:
        return 0
    each = args.eval_steps if args.eval_strategy == IntervalStrategy.STEPS else steps / args.num_train_epochs
    return ceil(steps / each) + args.eval_on_start


def _quiet(config: TrainConfig) -> TrainConfig:
    """Turn checkpoints, reports and uploads off; and every term on, whatever its schedule begins with."""
    quiet = {"save_strategy": "no", "report_to": [], "push_to_hub": False}
    if config.eval_data is not None:  # of an evaluation a few batches are measured
        quiet |= {"load_best_model_at_end": False, "eval_on_start": False, "eval_strategy": "steps"}
    weights = {f"lambda_{name}": highest(config.weights[name]) for name in config.taught}
    return config.model_copy(update={"save_steps": 0, "training": config.training | quiet} | weights)


def _longest(trainer: SwitchKDTrainer) -> Batch:
    """A batch of the longest samples, as their texts tell (`rough_lengths`)."""
    data: TrainingSamples = trainer.train_dataset
    lengths = data.lengths()
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    usable = (found for index in longest if isinstance(found := data[index], Example))
    first = next(usable)
    limits = limits_of_batches(trainer.args)
    count = 1
    while limits.hold(count + 1, len(first.encoded)):
        count += 1
    return batch_of([first, *islice(usable, count - 1)], data.encoder.pad_token_id)


def _run(trainer: SwitchKDTrainer, batch: Batch) -> None:
    """Forward and backward, the switched path among it, beside the optimizer's state; where gradients are
    accumulated, once more beside the gradients."""
    trainer.state.global_step = 0  # in which the switched path runs, whatever `vsd_every` is
    tokens = int(batch.student.supervised.sum())
    for _ in range(min(2, trainer.args.gradient_accumulation_steps)):
        trainer.training_step(trainer.model_wrapped, batch, tokens)


def _estimate(
    config: TrainConfig,
    trainer: SwitchKDTrainer,
    watch: _Stopwatch,
    batch: Batch,
    peaks: _Peaks,
    disk: RunSize,
) -> TrainEstimate:
    student, teacher = trainer.vlm, None if trainer.teacher is None else trainer.teacher.model
    peak = max(peaks.random, peaks.longest)
    memory = {
        "student": _weights(student),
        "teacher": 0 if teacher is None else _weights(teacher),
        "gradients": watch.gradients,
        "optimizer": watch.optimizer,
    }
    bridge = 0 if trainer.bridge is None else sum(p.numel() for p in trainer.bridge.parameters())
    if trainer.bridge is not None:
        memory["switch bridge"] = _weights(trainer.bridge)
        memory["gradients"] += _weights(trainer.bridge)
    memory["before the models"] = min(peaks.before, max(0, peak - sum(memory.values())))
    memory["activations, logits, data"] = max(0, peak - sum(memory.values()))
    samples, tokens = batch.student.supervised.shape
    return TrainEstimate(
        settings=_settings(config, trainer),
        student_parameters=sum(p.numel() for p in student.parameters()),
        trained_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        teacher_parameters=0 if teacher is None else sum(p.numel() for p in teacher.parameters()),
        bridge_parameters=bridge,
        memory=memory,
        logits_bytes=_logits(trainer, int(batch.student.supervised.sum())),
        peak_bytes=peak,
        random_peak_bytes=peaks.random,
        longest_peak_bytes=peaks.longest,
        longest_batch=(samples, tokens),
        seconds_per_step=_seconds_each(watch.ends),
        steps=watch.total_steps,
        measured_steps=len(watch.ends) - 1,
        disk=disk,
        disk_bytes=disk.total,
    )


def _settings(config: TrainConfig, trainer: SwitchKDTrainer) -> dict[str, Any]:
    args = trainer.args
    half = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    return {
        "batch_tokens": config.batch_tokens,
        "batch_size": config.batch_size,
        "gradient_accumulation": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "dtype": half or "float32",
        "gradient_checkpointing": config.gradient_checkpointing,
        "trainable": list(config.trainable),
        "lora": config.lora is not None,
        "optim": str(args.optim.value),
    }


def _logits(trainer: SwitchKDTrainer, answer_tokens: int) -> int:
    terms = trainer.terms
    at_a_time = answer_tokens if terms.head.reason else min(answer_tokens, terms.chunk)
    return 4 * at_a_time * terms.head.vocab_size


def _bytes(tensor: torch.Tensor) -> int:
    """In memory, where a layer that is fetched for its turn is not."""
    return 0 if tensor.is_meta else tensor.numel() * tensor.element_size()


def _weights(model: nn.Module) -> int:
    return sum(_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])
