"""Out of memory, said so that it can be mended; and what a disk says that failed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from cachekd.config import TrainConfig
from cachekd.errors import BadSample, CachekdError, without_frames

if TYPE_CHECKING:
    from cachekd.data import Encoded


T = TypeVar("T")
R = TypeVar("R")

# What a failed allocation says; only some of them have a class of their own.
_NO_ROOM_ON_THE_GPU = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",  # cuDNN 9
)
_NO_ROOM_ON_THE_CPU = ("can't allocate memory", "DefaultCPUAllocator: not enough memory")


@contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Turn out-of-memory errors into which knob to turn, the cheapest first. Other errors go on unchanged.

    Raises:
        CachekdError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        device = memory_that_ran_out(error)
        if device is None:
            raise
        text = str(error)
        raise CachekdError(
            "out of memory",
            where=f"stage two, on the {device}",
            found=text.splitlines()[0] if text else None,
            fix="; or ".join(_knobs(config)) + ". `cachekd train --estimate` shows what needs how much",
        ) from error


def memory_that_ran_out(error: Exception) -> str | None:
    """Whose, as an error says: "CPU" or "GPU"; None if it is another error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(said in text for said in _NO_ROOM_ON_THE_GPU):
        return "GPU"
    if isinstance(error, MemoryError) or any(said in text for said in _NO_ROOM_ON_THE_CPU):
        return "CPU"
    return None


def free_memory() -> None:
    """Of what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failed_forward(error: Exception, samples: Sequence[Encoded], who: str, *, kept: bool) -> CachekdError:
    """What a forward raised, for people: a `BadSample` where it is the samples' fault.

    Args:
        samples: of the batch.
        who: the model, such as "the teacher".
        kept: whether what is finished stays, and the same command goes on from there.
    """
    longest, found = max(samples, key=len), f"{type(error).__name__}: {error}".strip().splitlines()[0]
    where = f"sample {longest.key!r} with {len(longest):,} tokens"
    if len(samples) > 1:
        where = f"{len(samples)} samples, the longest is {longest.key!r} with {len(longest):,} tokens"
    again = "run the same command again" + (": what is finished stays" if kept else "")
    if (device := memory_that_ran_out(error)) is not None:
        return CachekdError(
            f"the {device}'s memory is too small for this batch",
            where=where,
            found=found,
            fix="run the same command with a smaller --batch-size: what is finished stays"
            if len(samples) > 1 and kept
            else "--max-tokens N --too-long skip leaves out what is longer",
        )
    if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
        # It answers nothing any more: every later sample would look bad.
        return CachekdError(
            f"the GPU failed while {who} ran",
            where=where,
            found=found,
            fix=f"{again}. If it fails at the same samples, CUDA_LAUNCH_BLOCKING=1 shows where",
        )
    return BadSample(f"{who} cannot run on the sample", where=where, found=found)


def together_or_each(run: Callable[[list[T]], Iterable[R]], batch: list[T]) -> list[R | BadSample]:
    """What a batch gives; of one that cannot be run, what each item gives by itself, or its fault.

    Args:
        run: raises `BadSample` where the fault is some item's.
    """
    try:
        return list(run(batch))
    except BadSample as error:
        bad = without_frames(error)
    # Here the frames that held the batch's tensors are gone.
    return [bad] if len(batch) == 1 else [found for one in batch for found in together_or_each(run, [one])]


def _knobs(config: TrainConfig) -> list[str]:
    knobs = []
    if not config.gradient_checkpointing:
        knobs.append("--gradient-checkpointing (a third slower)")
    if config.batch_size > 1:
        half, twice = config.batch_size // 2, config.gradient_accumulation * 2
        knobs.append(f"--batch-size {half} --gradient-accumulation {twice} (the same steps)")
    if config.live_teacher:
        knobs.append("a cache instead of --live-teacher")
    if config.teacher is not None and config.switches and config.teacher_quantization is None:
        knobs.append("teacher_quantization: {load_in_4bit: true} in the YAML")
    if len(config.trainable) > 1:
        knobs.append(_fewer_parts(config))
    if config.lora is None:
        knobs.append(
            "training: {optim: adamw_8bit} (with bitsandbytes) or lora: {r: 16, target_modules: all-linear} "
            "in the YAML"
        )
    knobs.append("--logit-chunk 32")
    return knobs


def _fewer_parts(config: TrainConfig) -> str:
    """Frozen weights have neither gradients nor moments; the language model has most of them."""
    if config.switches:
        return "--trainable vision_encoder,projector (no gradients and moments of the language model)"
    return "--trainable projector (gradients and moments of that part alone)"
