"""What a training step holds in memory, from the configurations alone: no weights are read, and none exist.

Both models run on tensors without memory (torch's `FakeTensorMode`), forward and backward, as in a step,
while every tensor that would have memory is counted. So what autograd keeps is what it would keep, under
autocast and with recomputed layers too.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from cachekd.data import Encoded, collate
from cachekd.losses import chunk_tokens, summed_over_chunks
from cachekd.models import empty_model, language_model, parameters_by_part
from cachekd.models.split import image_inputs

_WINDOW = 128  # of DBiLD
_MOMENTS = 2  # of AdamW, of the parameters' own size


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step by part, and at the most; without what the process held before.

    Attributes:
        weights: of the student.
        teacher: P_T, L_T and the head, frozen.
        gradients, optimizer: of the student, with AdamW.
        activations: what the student's forward leaves for its backward, autocast's copies of its weights
            among it.
        switched: likewise, of the student's visual features in L_T.
        logits: what a chunk of answer tokens holds at the most, beside its states.
        peak: of all of it at a time: gradients come while activations go, so it is less than the sum.
    """

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    activations: int
    switched: int
    logits: int
    peak: int


@dataclass(frozen=True)
class _Run:
    """Bytes of one model's forward and backward, without its weights: what the forward leaves, what logits
    take beyond that, and the most, gradients among it."""

    kept: int
    logits: int
    most: int


def step_memory(
    student: Any,
    teacher: Any | None,
    sample: Encoded,
    *,
    batch_size: int,
    half: torch.dtype | None,
    as_teacher: Encoded | None = None,
) -> dict[bool, StepMemory]:
    """One step of a student that trains in whole, in float32.

    Args:
        student, teacher: configs; without a teacher nothing is switched.
        sample: as the student reads it; the batch has so many of it.
        half: the dtype of autocast and of the teacher; None: float32 throughout.
        as_teacher: the sample as the switched path reads it; by default as the student does.

    Returns:
        by whether layers are recomputed (gradient checkpointing, in both models); empty where a family's
        modules look at values that do not exist here.
    """
    read = (sample, as_teacher or sample)
    batch, their_batch = (collate([one] * batch_size, 0) for one in read)
    answers, their_answers = (batch_size * len(one.token_ids) for one in read)
    ours, theirs = empty_model(student), None if teacher is None else empty_model(teacher)
    weights = _elements(ours) * torch.float32.itemsize
    frozen = 0 if theirs is None else _elements(theirs, without_tower=True) * (half or torch.float32).itemsize
    switched = theirs if "pixel_values" in their_batch else None
    try:
        return {
            recomputed: _step(
                weights,
                frozen,
                _run(ours, batch, answers, half=half, recomputed=recomputed, frozen=False),
                switched
                and _run(switched, their_batch, their_answers, half=half, recomputed=recomputed, frozen=True),
            )
            for recomputed in (False, True)
        }
    except Exception:  # of a family's own code, each has its own
        return {}


def _step(weights: int, frozen: int, ours: _Run, theirs: _Run | None) -> StepMemory:
    theirs = theirs or _Run(0, 0, 0)
    held = weights * (1 + _MOMENTS) + frozen
    return StepMemory(
        weights=weights,
        teacher=frozen,
        gradients=weights,
        optimizer=_MOMENTS * weights,
        activations=ours.kept,
        switched=theirs.kept,
        logits=max(ours.logits, theirs.logits),
        # The switched path's backward comes first, while all that the student's forward left is there.
        peak=held + max(ours.most, ours.kept + theirs.most, weights),
    )


def _run(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    answers: int,
    *,
    half: torch.dtype | None,
    recomputed: bool,
    frozen: bool,
) -> _Run:
    """The student; or, `frozen`, L_T alone, whose gradient goes through it to visual features."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _fill(model, half if frozen and half is not None else torch.float32)
        model.requires_grad_(not frozen).train()
        if recomputed:
            _recompute(model)
        inputs = {name: fake.from_tensor(x) if x.is_floating_point() else x for name, x in batch.items()}
        live = _Live(model)
        with live:
            with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None and not frozen):
                states = _states(model, inputs, frozen=frozen).flatten(0, -2)[:answers]
                kept = live.now
                live.most = kept
                total = _loss(model, states, frozen=frozen)
                logits = live.most - kept
            total.backward()
    return _Run(kept, logits, live.most)


def _states(model: PreTrainedModel, inputs: Mapping[str, Tensor], *, frozen: bool) -> Tensor:
    """[B, S, d], what the head reads."""
    ids = inputs["input_ids"]
    embed = model.get_input_embeddings()
    if frozen:
        shape = (*ids.shape, embed.embedding_dim)
        places = torch.empty(shape, dtype=model.dtype, device="cpu", requires_grad=True)
    else:
        places = embed(ids)
        if "pixel_values" in inputs:
            found = model.get_image_features(**image_inputs(model, inputs), return_dict=True).pooler_output
            features = torch.cat(list(found)) if isinstance(found, list | tuple) else found
            mask = torch.empty(places.shape, dtype=torch.bool, device="cpu")
            places = places.masked_scatter(mask, features.to(places.dtype))
    states: Tensor = language_model(model)(inputs_embeds=places, use_cache=False).last_hidden_state
    return states


def _loss(model: PreTrainedModel, states: Tensor, *, frozen: bool) -> Tensor:
    """A loss that holds of the logits what L_CE and DBiLD hold."""
    head = model.get_output_embeddings()

    def loss(some: Tensor, rows: Tensor) -> dict[str, Tensor]:
        logits = head(some).float()
        ids = logits.detach().topk(min(_WINDOW, logits.shape[-1])).indices
        total = logits.gather(-1, ids).square().sum()
        if not frozen:
            total = total + F.cross_entropy(logits, rows, reduction="sum")
        return {"loss": total}

    return summed_over_chunks(loss, states, chunk_tokens(head.weight.shape[0]))["loss"]


def _fill(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model of `empty_model` tensors that say that they are on the CPU; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(
                        tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype
                    )
                    made[id(tensor)] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
                tensors[name] = made[id(tensor)]


def _recompute(model: PreTrainedModel) -> None:
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.23 renamed it
        model.activation_checkpointing_enable(how)
    else:
        model.gradient_checkpointing_enable(how)


def _elements(model: PreTrainedModel, *, without_tower: bool = False) -> int:
    parts = parameters_by_part(model)
    return sum(
        parameter.numel()
        for part, parameters in parts.items()
        if not (without_tower and part == "vision_encoder")
        for parameter in parameters.values()
    )


def _has_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation is on whole numbers that are there: sizes of pictures, masks, token ids."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if tensors:
        return not any(isinstance(tensor, FakeTensor) or tensor.is_floating_point() for tensor in tensors)
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point
    return func.overloadpacket is torch.ops.aten.arange and not any(isinstance(x, float) for x in args)


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that there are, but for those of a model.

    Attributes:
        now, most: bytes, now and at the most.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._there = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _has_values(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if (name := storage._cdata) in self._there:
            return
        size = storage.nbytes()
        self._there.add(name)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, name, size)

    def _forget(self, name: int, size: int) -> None:
        self._there.discard(name)
        self.now -= size
