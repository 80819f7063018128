"""What a training step holds in memory, from the configurations alone: no weights are read, and none exist.

Both models run on tensors without memory (torch's `FakeTensorMode`), forward and backward, as in a step,
while every tensor that would have memory is counted. So what autograd keeps is what it would keep, under
autocast and with recomputed layers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from cachekd.check.fake import Live, fill, recompute
from cachekd.config import TrainConfig
from cachekd.config.fields import PARTS, StudentPart
from cachekd.data import Encoded, collate
from cachekd.losses import chunk_tokens, summed_over_chunks
from cachekd.models import empty_model, language_model, train_only
from cachekd.models.adapters import with_adapters
from cachekd.models.quantization import bits_of, stored_bytes
from cachekd.models.split import image_inputs

_WINDOW = 128  # of DBiLD
MOMENTS = 8  # bytes of a parameter: AdamW's two, in float32
# Bytes of a parameter in bfloat16 while its step is taken, one after the other: it and its gradient in
# float32, and what rounding it makes (`cachekd.train.rounding`).
_STEP = 18


@dataclass(frozen=True)
class StepSetting:
    """How a pair is trained, as far as memory depends on it.

    Attributes:
        batch_size: samples.
        half: the dtype of autocast and of the teacher; None: float32 throughout.
        student_dtype: of the student's weights and gradients. Adapters are in float32 in any case.
        lora: settings of `peft.LoraConfig`; None: the student's own weights train.
        trainable: the parts of the student that train.
        optimizer_bytes: of a parameter that trains: 8 are AdamW's, 2 those of AdamW in 8 bits.
        teacher_bits, student_bits: 4 or 8 of a quantised model's layers (`stored_bytes`); None: in their
            dtype.
        switched: whether the switched path is on. Without it there is no teacher in memory.
    """

    batch_size: int
    half: torch.dtype | None
    student_dtype: torch.dtype = torch.float32
    lora: dict[str, Any] | None = None
    trainable: tuple[StudentPart, ...] = PARTS
    optimizer_bytes: int = MOMENTS
    teacher_bits: int | None = None
    student_bits: int | None = None
    switched: bool = True

    @classmethod
    def of(cls, config: TrainConfig, half: torch.dtype | None, tokens: int | None = None) -> Self:
        """What a run's settings say.

        A quantisation by another backend than bitsandbytes counts as none, an optimizer that is no AdamW as
        AdamW: both take no more than that.

        Args:
            half: `dtype: auto` is another on a CPU than on a GPU, so it is said here.
            tokens: of a sample, by which `batch_tokens` says how many of it are in a batch.
        """
        samples = config.most_samples
        if config.batch_tokens is not None and tokens is not None:
            samples = max(1, min(samples, config.batch_tokens // tokens))
        return cls(
            batch_size=samples,
            half=half,
            student_dtype=getattr(torch, config.student_dtype),
            lora=config.lora,
            trainable=config.trainable,
            optimizer_bytes=2 if "8bit" in str(config.training.get("optim")) else MOMENTS,
            teacher_bits=bits_of(config.teacher_quantization),
            student_bits=bits_of(config.student_quantization),
            switched=config.switches,
        )

    def __str__(self) -> str:
        """What is not as by default, for people."""
        said = [] if self.student_dtype == torch.float32 else ["student in bfloat16"]
        said += [] if self.student_bits is None else [f"student in {self.student_bits} bits"]
        said += [] if self.lora is None else ["adapters"]
        said += [] if self.trainable == PARTS else [f"{' and '.join(self.trainable)} alone"]
        said += [] if self.optimizer_bytes == MOMENTS else ["moments in 8 bits"]
        said += [] if self.teacher_bits is None else [f"teacher in {self.teacher_bits} bits"]
        said += [] if self.switched else ["without the switched path"]
        return ", ".join(said)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step by part, and at the most; without what the process held before.

    Attributes:
        weights: of the student, adapters among them.
        teacher: P_T, L_T and the head, frozen.
        gradients, optimizer: of what trains.
        activations: what the student's forward leaves for its backward, autocast's copies of its weights
            among it.
        switched: likewise, of the student's visual features in L_T.
        logits: what a chunk of answer tokens holds at the most, beside its states.
        peak: of all of it at a time: less than the sum, as gradients come while activations go; more where
            the step of a large parameter in bfloat16 takes more than a chunk and all activations (`_STEP`).
    """

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    activations: int
    switched: int
    logits: int
    peak: int


# What people read of these parts, in this order.
PART_NAMES = {
    "weights": "the student's weights",
    "teacher": "the teacher's, frozen",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "activations": "activations of the student",
    "switched": "activations of the switched path",
    "logits": "a chunk of logits",
    "peak": "at the most at a time",
}


@dataclass(frozen=True)
class _Held:
    """Bytes that follow from the weights alone, by part; `stepping` while the optimizer takes its step."""

    weights: int
    teacher: int
    gradients: int
    optimizer: int
    stepping: int


@dataclass(frozen=True)
class _Run:
    """Bytes of one model's forward and backward, without its weights: what the forward leaves, what logits
    take beyond that, and the most, gradients among it."""

    kept: int = 0
    logits: int = 0
    most: int = 0


def step_memory(
    student: Any,
    teacher: Any | None,
    sample: Encoded,
    setting: StepSetting,
    *,
    as_teacher: Encoded | None = None,
    recomputed: tuple[bool, ...] = (False, True),
) -> dict[bool, StepMemory]:
    """One step of training, whose weights may be of any size.

    What is not counted: a layer's weights out of 4 or 8 bits while it runs, and a switch bridge.

    Args:
        student, teacher: configs; without a teacher nothing is switched.
        sample: as the student reads it; the batch has so many of it. Of its pixels the shape alone counts:
            they may be on "meta". No picture may be padding.
        as_teacher: the sample as the switched path reads it; by default as the student does.
        recomputed: which of the two to compute; each takes its time.

    Returns:
        by whether layers are recomputed (gradient checkpointing, in both models); empty where a family's
        modules look at values that do not exist here.

    Raises:
        CachekdError: peft is not installed or refuses the settings; nothing is left to train.
    """
    read = (sample, as_teacher or sample)
    batch, their_batch = (collate([_without_pixels(one)] * setting.batch_size, 0) for one in read)
    answers, their_answers = (setting.batch_size * len(one.token_ids) for one in read)
    ours = empty_model(student, dtype=setting.student_dtype)
    weights = stored_bytes(ours, setting.student_bits)
    if setting.lora is None:
        train_only(ours, setting.trainable)
    else:
        own = {id(parameter) for parameter in ours.parameters()}
        with torch.device("meta"):
            with_adapters(ours, setting.lora, setting.trainable)
        weights += sum(p.nbytes for p in ours.parameters() if id(p) not in own)
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    stepped = (_STEP * parameter.numel() for parameter in trained if parameter.dtype != torch.float32)
    theirs = None
    if teacher is not None and setting.switched:
        theirs = empty_model(teacher, dtype=setting.half or torch.float32).requires_grad_(False)
    held = _Held(
        weights=weights,
        teacher=0 if theirs is None else stored_bytes(theirs, setting.teacher_bits, tower=False),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=sum(parameter.numel() for parameter in trained) * setting.optimizer_bytes,
        stepping=max(stepped, default=0),
    )
    switched = theirs if "pixel_values" in their_batch else None
    try:
        return {
            each: _step(
                held,
                _run(ours, batch, answers, half=setting.half, recomputed=each, frozen=False),
                _Run()
                if switched is None
                else _run(switched, their_batch, their_answers, half=None, recomputed=each, frozen=True),
            )
            for each in recomputed
        }
    except Exception:  # of a family's own code, each has its own
        return {}


def _without_pixels(sample: Encoded) -> Encoded:
    """The sample with its floating-point tensors on "meta"; whole numbers (sizes, masks, ids) stay."""
    inputs = {name: x.to("meta") if x.is_floating_point() else x for name, x in sample.inputs.items()}
    return replace(sample, inputs=inputs)


def _step(held: _Held, ours: _Run, theirs: _Run) -> StepMemory:
    """Put a step together."""
    return StepMemory(
        weights=held.weights,
        teacher=held.teacher,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=ours.kept,
        switched=theirs.kept,
        logits=max(ours.logits, theirs.logits),
        # The switched path's backward comes first, while all that the student's forward left is there.
        peak=held.weights
        + held.teacher
        + held.optimizer
        + max(ours.most, ours.kept + theirs.most, held.gradients + held.stepping),
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
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill(model)
        model.train()
        if recomputed:
            recompute(model)
        inputs = {
            name: torch.empty(x.shape, dtype=x.dtype, device="cpu") if x.is_meta else x
            for name, x in batch.items()
        }
        live = Live(model)
        with live:
            with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
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
