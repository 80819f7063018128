"""The parameters of a VLM by part: vision encoder, projector, language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from cachekd.config.fields import PARTS, StudentPart
from cachekd.errors import CachekdError
from cachekd.losses.terms import labels, options_off
from cachekd.models.families import (
    TEXT_ONLY,
    changed,
    family_of,
    language_model,
    projectors_in_tower,
    vision_tower,
)


def part_modules(model: PreTrainedModel) -> dict[StudentPart, list[nn.Module]]:
    """Modules by part, L with its head; of a parameter in two of them, the later counts.

    What is in none, such as `image_newline`, is P's.
    """
    language = [language_model(model), model.get_output_embeddings()]
    if family_of(model.config) is TEXT_ONLY:
        return {"language_model": language}
    return {
        "vision_encoder": [vision_tower(model)],
        "projector": projectors_in_tower(model),
        "language_model": language,
    }


def parameters_by_part(model: PreTrainedModel) -> dict[StudentPart, dict[str, nn.Parameter]]:
    """Every parameter of a VLM in exactly one part, under its name in the model.

    Args:
        model: the VLM itself, out of peft's wrapper.
    """
    owner = {
        id(parameter): part
        for part, modules in part_modules(model).items()
        for module in modules
        for parameter in module.parameters()
    }
    parts: dict[StudentPart, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[owner.get(id(parameter), "projector")][name] = parameter
    return parts


def train_only(model: PreTrainedModel, trainable: tuple[StudentPart, ...]) -> None:
    """Freeze the other parts. Dropout and the like are left as they are.

    Raises:
        CachekdError: nothing is left to train.
    """
    for part, parameters in parameters_by_part(model).items():
        if part not in trainable:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
    if not any(trained_parts(model)):
        raise CachekdError(
            "nothing is left to train",
            where=f"setting 'trainable' and {type(model).__name__}",
            expected="a part that has weights",
            found=f"no weights in {', '.join(trainable)}",
        )


def modules_outside(model: PreTrainedModel, trainable: tuple[StudentPart, ...]) -> list[str]:
    """Names of the modules whose parameters belong to other parts; peft must not touch them."""
    return sorted(
        {
            name.rpartition(".")[0]
            for part, parameters in parameters_by_part(model).items()
            if part not in trainable
            for name in parameters
            if "." in name
        }
    )


def reach_by_text(model: PreTrainedModel) -> None:
    """Let a batch without images give zero gradient, not an error, where L is frozen.

    Nothing that trains runs in it, so there would be nothing to go backwards through, and DDP's other
    processes would wait. So L's states get nothing times a weight that trains, inside the model's forward,
    where DDP looks.

    Args:
        model: the VLM itself, whose parts are frozen as they will be.
    """
    trained = next((parameter for parameter in model.parameters() if parameter.requires_grad), None)
    if trained is None:
        return

    def reach(_module: nn.Module, _args: Any, output: ModelOutput) -> ModelOutput:
        states = output["last_hidden_state"]
        if states.requires_grad or not torch.is_grad_enabled():
            return output
        return changed(output, last_hidden_state=states + 0 * trained.sum().to(states.dtype))

    language_model(model).register_forward_hook(reach)


def trained_parts(model: PreTrainedModel) -> Iterator[StudentPart]:
    """The parts in which something requires a gradient."""
    for part, parameters in parameters_by_part(model).items():
        if any(parameter.requires_grad for parameter in parameters.values()):
            yield part


def check_adapters(
    model: PreTrainedModel, trainable: tuple[StudentPart, ...], switched: Sequence[str]
) -> None:
    """Refuse adapters where nothing is to train, and terms of the switched path where no adapter is.

    Args:
        model: the VLM inside peft's wrapper.
        switched: the terms of the switched path that are on.

    Raises:
        CachekdError: peft trains something in a frozen part, or nothing in V_S while such a term is on.
    """
    found = tuple(trained_parts(model))
    outside = [part for part in found if part not in trainable]
    if outside:
        raise CachekdError(
            "peft would train a part that is to stay as it is",
            where="settings 'lora' and 'trainable'",
            expected=f"weights in {', '.join(trainable)} only",
            found=f"also in {', '.join(outside)}",
            fix="leave `bias` and `modules_to_save` out of `lora`, or add the part to `trainable`",
        )
    if switched and "vision_encoder" not in found:
        raise CachekdError(
            f"{labels(switched)} would have no gradient: the switched path reaches the student's vision "
            "encoder, which has no adapters",
            where="setting 'lora'",
            expected="target_modules that name layers of the vision encoder",
            found=f"adapters in {', '.join(found) or 'no part'}",
            fix=f"target_modules: all-linear includes it; or set {options_off(switched)}",
        )
