"""Out of memory and failed forwards, said so that they can be mended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cachekd.errors import BadSample, CachekdError, what_failed, without_frames

if TYPE_CHECKING:
    from cachekd.data import Encoded


T = TypeVar("T")
R = TypeVar("R")

# What a failed allocation says; only some of them have a class of their own.
_NO_ROOM_ON_THE_GPU = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "Invalid buffer size",  # Metal's, of one larger than it allows
    "XPU out of memory",
    "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",  # XPU's runtime
    "UR_RESULT_ERROR_OUT_OF_RESOURCES",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",  # cuDNN 9
)
_GPU_FAILED = ("CUDA error", "UR_RESULT_ERROR", "UR error", "command buffer exited with error")
_NO_ROOM_ON_THE_CPU = ("can't allocate memory", "DefaultCPUAllocator: not enough memory")


class OutOfMemory(CachekdError):
    """The memory is too small for a batch."""


def memory_that_ran_out(error: Exception) -> str | None:
    """Whose, as an error says: "CPU" or "GPU"; None if it is another error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(said in text for said in _NO_ROOM_ON_THE_GPU):
        return "GPU"
    if isinstance(error, MemoryError) or any(said in text for said in _NO_ROOM_ON_THE_CPU):
        return "CPU"
    return None


def failed_forward(error: Exception, samples: Sequence[Encoded], who: str, *, kept: bool) -> CachekdError:
    """What a forward raised, for people: a `BadSample` where it is the samples' fault.

    Args:
        samples: of the batch.
        who: the model, such as "the teacher".
        kept: whether what is finished stays, and the same command goes on from there.
    """
    longest, found = max(samples, key=len), what_failed(error)
    where = f"sample {longest.key!r} with {len(longest):,} tokens"
    if len(samples) > 1:
        where = f"{len(samples)} samples, the longest is {longest.key!r} with {len(longest):,} tokens"
    again = "run the same command again" + (": what is finished stays" if kept else "")
    if (device := memory_that_ran_out(error)) is not None:
        return OutOfMemory(
            f"the {device}'s memory is too small for this batch",
            where=where,
            found=found,
            fix=f"run the same command with --batch-tokens {len(samples) * len(longest) // 2}: what is "
            "finished stays (--on-oom halve does so by itself, once the pilot is over)"
            if len(samples) > 1 and kept
            else "--max-tokens N --too-long skip leaves out what is longer; or --max-memory "
            f"{'0' if device == 'GPU' else 'cpu'}=... has fewer of the model's layers there",
        )
    if any(said in str(error) for said in _GPU_FAILED) or type(error).__name__ == "AcceleratorError":
        # It answers nothing any more: every later sample would look bad.
        return CachekdError(
            f"the GPU failed while {who} ran",
            where=where,
            found=found,
            fix=f"{again}. If it fails at the same samples, ACCELERATE_USE_CPU=true says why, and "
            "CUDA_LAUNCH_BLOCKING=1 shows where",
        )
    return BadSample(f"{who} cannot run on the sample", where=where, found=found)


def require_embeddings(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Refuse ids beyond the embedding's rows while they are on the CPU. On a GPU the look-up is a failed
    assertion, after which the process can compute nothing more: the samples that follow would fail too.

    Args:
        input_ids: [B, S] int64, on the CPU. Placeholders of images are looked up by no model.

    Raises:
        IndexError: there is one.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is None:
        return
    beyond = input_ids[(input_ids >= rows) & (input_ids != getattr(model.config, "image_token_id", None))]
    if len(beyond):
        raise IndexError(f"id {int(beyond[0]):,} is beyond the {rows:,} rows of the embedding")


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
