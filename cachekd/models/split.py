"""A VLM taken apart at its seams: vision encoder, projector, language model.

The split calls no submodule by hand. The projection is the model's own `get_image_features` around a
*replayed* encoder output; the language model is the model's own forward with `mm_encoder_outputs` in place
of pixels. So selection of layers, dropping of class tokens, splicing, positions, masks and logit scaling
stay the family's.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cachekd.errors import CachekdError, what_failed
from cachekd.losses.terms import WITHOUT_SWITCH
from cachekd.models.families import (
    FAMILIES,
    PIXEL_INPUTS,
    changed,
    family_of,
    vision_tower,
    vision_tower_name,
)
from cachekd.models.placement import input_device, is_dispatched, is_placed, output_device


def rounding_tolerance(dtype: torch.dtype) -> float:
    """The share of the logits' deviation by which the same operations on the same numbers may differ."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)


class VisionCapture:
    """Holds the raw output of the vision encoder's last forward; None if it did not run (no image)."""

    output: ModelOutput | None = None


@contextmanager
def capture_vision(model: PreTrainedModel) -> Iterator[VisionCapture]:
    """Record V's output while the model runs its own forward, so that V runs once (and DDP sees it run).

    The output is a shallow copy: some families overwrite fields of the original. Where the projector lies
    inside the encoder, `last_hidden_state` is what the projector reads, and `deepstack_features` are the
    inputs of its other mergers. A language model's capture stays empty.
    """
    capture = VisionCapture()
    family = family_of(model.config)
    if family.tower is None:
        yield capture
        return
    tower = vision_tower(model)
    taps: list[Tensor] = []

    def record(_module: nn.Module, _args: Any, output: ModelOutput) -> None:
        capture.output = copy.copy(output)
        if family.taps:
            capture.output["deepstack_features"] = list(taps)
            taps.clear()

    mergers = [merger for name in family.taps for merger in getattr(tower, name)]
    handles = [
        tower.register_forward_hook(record),
        *(merger.register_forward_pre_hook(lambda _module, args: taps.append(args[0])) for merger in mergers),
    ]
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()


def encode(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> ModelOutput:
    """V alone: the vision encoder's raw output for a batch's pixels.

    Args:
        inputs: a batch with `pixel_values` and whatever else the family's `get_image_features` takes.
    """
    with capture_vision(model) as capture:
        model.get_image_features(**image_inputs(model, inputs), return_dict=True)
    assert capture.output is not None  # the family runs its encoder, or the hook's tower is not the encoder
    return capture.output


def project(model: PreTrainedModel, vision_output: ModelOutput, inputs: Mapping[str, Tensor]) -> ModelOutput:
    """P alone: the model's own image features, from any encoder's raw output.

    Args:
        model: the VLM whose projector is used; it is not changed.
        vision_output: what `encode` or `capture_vision` gave, in the width that this projector takes.
        inputs: the batch; pixels are passed on but not looked at.

    Returns:
        the family's output with `pooler_output`: features per image, ready for `mm_encoder_outputs`.
    """
    name = vision_tower_name(model.config)
    inner = copy.copy(model.model)
    output = cast_output(vision_output, model.dtype, input_device(model) if is_placed(model) else None)
    replay = family_of(model.config).replay(getattr(inner, name), output)
    # nn.Module.__setattr__ would write into the dictionary that the copy still shares with the model.
    inner.__dict__["_modules"] = {**model.model._modules, name: replay}
    return inner.get_image_features(**image_inputs(model, inputs), return_dict=True)


def decode(
    model: PreTrainedModel, image_features: ModelOutput, inputs: Mapping[str, Tensor], positions: Tensor
) -> Tensor:
    """L alone: logits from ready image features.

    Args:
        image_features: from `project`.
        inputs: the batch.
        positions: [B, S] bool, where logits are wanted.

    Returns:
        [N, V] logits at the N positions, in row-major order; where the model's head is.
    """
    text = text_inputs(moved(model, inputs))
    output = model(
        **text,
        mm_encoder_outputs={"image": image_features},
        logits_to_keep=kept(model, positions),
        use_cache=False,
    )
    return output.logits.flatten(0, -2)


def logits_at(model: PreTrainedModel, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """The whole forward: [N, V] logits at `positions` [B, S] bool, where the model's head is; it runs there
    and nowhere else."""
    inputs = with_pixels_cast(model, moved(model, inputs))
    return model(**inputs, logits_to_keep=kept(model, positions), use_cache=False).logits.flatten(0, -2)


def hidden_and_logits_at(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Do as `logits_at` does, and keep the final hidden states (after the last norm) that the head read.

    Returns:
        hidden [N, d] and logits [N, V], on the device of the model's head.
    """
    states: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _module, args: states.append(args[0]))
    try:
        logits = logits_at(model, inputs, positions)
    finally:
        handle.remove()
    return states[-1].flatten(0, -2).to(logits.device), logits


def moved(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch where the model takes it: a teacher may be on other devices than the student."""
    if not is_placed(model):
        return dict(inputs)
    return {name: value.to(input_device(model)) for name, value in inputs.items()}


def kept(model: PreTrainedModel, positions: Tensor) -> Tensor:
    """The mask of the places where logits are wanted, so that it can index the model's last states."""
    if is_dispatched(model):
        return positions.cpu()
    return positions.to(output_device(model)) if is_placed(model) else positions


def image_inputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the model's `get_image_features` takes."""
    names = inspect.signature(model.model.get_image_features).parameters
    inputs = with_pixels_cast(model, moved(model, inputs))
    return {name: value for name, value in inputs.items() if name in names}


def with_pixels_cast(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch whose pixels have the model's dtype: most encoders see to that themselves, some do not."""
    cast = {name: inputs[name].to(model.dtype) for name in ("pixel_values",) if name in inputs}
    return {**inputs, **cast}


def text_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that goes into the language model once the image features are there."""
    return {name: value for name, value in inputs.items() if name not in PIXEL_INPUTS}


def cast_output(output: ModelOutput, dtype: torch.dtype, device: torch.device | None = None) -> ModelOutput:
    """A shallow copy of an encoder's output with its floating-point tensors in `dtype`, and all on `device`
    where one is given (gradients flow)."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)
        return tuple(cast(item) for item in value) if isinstance(value, tuple | list) else value

    return changed(output, **{name: cast(value) for name, value in output.items()})


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode; afterwards each of its modules is in its own again: some differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def prove_split(model: PreTrainedModel, inputs: Mapping[str, Tensor], positions: Tensor) -> float:
    """Take a model apart on one batch and compare with its whole forward.

    Args:
        model: a VLM with its vision encoder; under LoRA the model inside.
        inputs: a batch with images.
        positions: [B, S] bool, where logits are compared.

    Returns:
        by how much they differ at most, as a share of the logits' deviation; mostly 0.

    Raises:
        CachekdError: V, P and L, one after the other, do not give the model's own logits.
    """
    try:
        with in_eval_mode(model):
            with capture_vision(model) as vision:
                whole = logits_at(model, inputs, positions)
            if vision.output is None:
                raise _refusal(model, "its vision encoder does not run in its forward")
            split = decode(model, project(model, vision.output, inputs), inputs, positions)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise _refusal(model, what_failed(error)) from error
    miss = float((split - whole).abs().max() / whole.float().std())
    if not miss <= rounding_tolerance(whole.dtype):
        raise _refusal(model, f"logits off by {miss:.1%} of their deviation")
    return miss


def _refusal(model: PreTrainedModel, found: str) -> CachekdError:
    return CachekdError(
        "the model cannot be split into vision encoder, projector and language model",
        where=f"{model.config.name_or_path or type(model).__name__}, model_type {model.config.model_type}",
        expected=f"the logits of its whole forward; supported families: {', '.join(FAMILIES)}",
        found=found,
        fix=WITHOUT_SWITCH,
    )
