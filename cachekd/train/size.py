"""What a run will save, in bytes, before any weights are loaded."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from cachekd.atomic import free_space
from cachekd.cache import LogitCache
from cachekd.check.data import RunModels
from cachekd.config import TrainConfig
from cachekd.data.processor import Processor
from cachekd.errors import CachekdError, is_failed_write, megabytes
from cachekd.lock import LOCK_FILE
from cachekd.models import SwitchBridge, empty_model, train_only
from cachekd.models.adapters import with_adapters

# Bytes, each a little more than it is.
_OF_A_TENSOR = 512  # its name, its place in a file
_OF_A_LOG_ENTRY = 640
_NOTES = 32 * 1024  # arguments, scheduler, configurations
_RANDOM_STATE = 32 * 1024  # of a process
_MOMENTS = 8  # of AdamW, a parameter: two of float32


@dataclass(frozen=True)
class RunSize:
    """Bytes on the disk, at most.

    Attributes:
        student: the trained student with its processor and its record; of adapters, these too.
        checkpoint: one: the weights (of adapters these alone), the optimizer's state of what trains, the
            processor.
        kept: checkpoints that are kept, beside the one that is being written or the student.
        checkpoints: at a time, the one that is being written among them.
    """

    student: int
    checkpoint: int
    kept: int
    checkpoints: int

    @property
    def total(self) -> int:
        """The bytes at the worst moment. (When the student is saved, no checkpoint is being written.)"""
        return max(self.checkpoints * self.checkpoint, self.kept * self.checkpoint + self.student)


def run_size(
    config: TrainConfig,
    args: TrainingArguments,
    samples: int,
    models: RunModels,
    cache: LogitCache | None,
) -> RunSize:
    """What a run saves, but for what others log of it (TensorBoard) and for the batches of a loss that is not
    finite. No weights are read.

    Args:
        samples: to train on.
        cache: whose manifest goes into the record.
    """
    student = empty_model(models.student.config)
    weights = _weights(student)
    if config.lora is None:
        train_only(student, config.trainable)
        adapted: nn.Module = student
        saved = weights
    else:
        with torch.device("meta"):
            adapted = with_adapters(student, config.lora, config.trainable)
        saved = sum(_bytes(weight) for weight in adapted.parameters() if weight.requires_grad)
        weights += saved
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    bridge = 0
    if config.switch_bridge is not None and models.teacher is not None:
        plan = models.bridge_plan()
        parts = list(SwitchBridge(plan, config.seed).parameters())
        bridge, trained = sum(map(_bytes, parts)), [*trained, *parts]
    a_parameter = _state_of_a_parameter(args)
    optimizer = sum(round(a_parameter * weight.numel()) + 3 * _OF_A_TENSOR for weight in trained)
    steps = _steps(samples, args)
    entries = 2 + steps / _each(args.logging_strategy, args.logging_steps, steps, args)
    entries += steps / _each(args.eval_strategy, args.eval_steps or steps, steps, args)
    beside = bridge + _NOTES + _size_of_processor(models.student.processor) + ceil(entries) * _OF_A_LOG_ENTRY
    record = 0 if cache is None else len(cache.manifest.to_json())
    kept, at_a_time = _checkpoints(steps, args)
    checkpoint = saved + optimizer + beside + args.world_size * _RANDOM_STATE
    return RunSize(weights + beside + record, checkpoint, kept, at_a_time)


def require_room(size: RunSize, out: Path) -> None:
    """Refuse a run whose checkpoints and student the disk has no room for; what is there of it counts.

    Raises:
        CachekdError: there is too little room.
    """
    place, free = free_space(out)
    there = sum(path.lstat().st_size for path in out.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    if size.total <= free + there:
        return
    already = f", and {megabytes(there)} are this run's" if there else ""
    raise CachekdError(
        "the disk is too small for what the run saves",
        where=str(place),
        expected=f"{megabytes(size.total)}: {told(size)}",
        found=f"{megabytes(free)} are free{already}",
        fix=_how_to_fit(size),
    )


def _how_to_fit(size: RunSize) -> str:
    ways = ["free some space", "choose an --out on a larger disk"]
    if size.kept > 1:
        ways.append("keep fewer checkpoints (training: {save_total_limit: 1} in the YAML)")
    if size.checkpoints:
        ways.append("save none: --save-steps 0")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}"


def told(size: RunSize) -> str:
    """Say of what the total is made."""
    student = f"the student with {megabytes(size.student)}"
    if not size.checkpoints:
        return f"{student}, and no checkpoints"
    return f"{student}, and up to {size.checkpoints} checkpoints at a time with {megabytes(size.checkpoint)}"


def _bytes(tensor: torch.Tensor) -> int:
    """Count its bytes in a file; the student trains in float32, whatever its config says."""
    return tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size()) + _OF_A_TENSOR


def _weights(model: nn.Module) -> int:
    """As `save_pretrained` writes them: shared ones once."""
    state = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(map(_bytes, state.values()))


def _state_of_a_parameter(args: TrainingArguments) -> float:
    """Bytes that the optimizer keeps for one, from a step of it on a small matrix; AdamW's where it takes a
    model to make one, or something else than a plain matrix."""
    weight = nn.Parameter(torch.ones(256, 128, device=args.device))
    weight.grad = torch.ones_like(weight)
    try:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([weight], **settings)
        optimizer.step()
    except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError):
        return _MOMENTS
    state: list[Any] = [x for x in optimizer.state[weight].values() if torch.is_tensor(x)]
    return sum(x.numel() * x.element_size() for x in state) / weight.numel()


def _size_of_processor(processor: Processor) -> int:
    """0 where there is no room to try it: that disk need not be the run's."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    except Exception as error:
        if not is_failed_write(error):
            raise
        return 0


def _steps(samples: int, args: TrainingArguments) -> int:
    """Count the optimizer's steps of the whole run, at most."""
    if args.max_steps > 0:
        return args.max_steps
    # By tokens a batch may have a single sample, and which do is not known here.
    in_a_batch = 1 if getattr(args, "batch_tokens", None) else args.per_device_train_batch_size
    batches = ceil(samples / (in_a_batch * args.world_size))
    return ceil(args.num_train_epochs * ceil(batches / args.gradient_accumulation_steps))


def _each(strategy: Any, every: float, steps: int, args: TrainingArguments) -> float:
    """Steps between two of something; `every` below 1 is a share of all."""
    if strategy == IntervalStrategy.NO:
        return steps
    if strategy == IntervalStrategy.EPOCH:
        return max(1.0, steps / args.num_train_epochs)
    return every if every >= 1 else ceil(every * steps)


def _checkpoints(steps: int, args: TrainingArguments) -> tuple[int, int]:
    """How many are kept, and how many there are while one is written."""
    if args.save_strategy == IntervalStrategy.NO:
        return 0, 0
    saved = ceil(steps / _each(args.save_strategy, args.save_steps, steps, args))
    limit = args.save_total_limit or saved
    if args.load_best_model_at_end:  # the best one is kept, and saved wherever it falls
        limit, saved = max(limit, 2), steps
    return min(limit, saved), min(limit + 1, saved)
