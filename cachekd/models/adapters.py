"""Adapters on a student, by peft."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cachekd.config.fields import PARTS, StudentPart
from cachekd.errors import CachekdError
from cachekd.models.parts import modules_outside


def lora_config(settings: dict[str, Any]) -> Any:
    """`peft.LoraConfig`.

    Raises:
        CachekdError: peft is not installed, or has no such setting.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise CachekdError(
            "peft is not installed", where="setting 'lora'", fix="pip install 'cachekd[peft]'"
        ) from None
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise CachekdError("peft refuses these settings", where="setting 'lora'", found=str(error)) from None


def with_adapters(
    student: PreTrainedModel, settings: dict[str, Any], trainable: tuple[StudentPart, ...] = PARTS
) -> nn.Module:
    """LoRA, or QLoRA where the student is quantised.

    Args:
        settings: of `peft.LoraConfig`.
        trainable: the parts that may have adapters.
    """
    adapters = lora_config(within(student, settings, trainable))
    from peft import get_peft_model

    if getattr(student, "is_quantized", False):
        # As peft's prepare_model_for_kbit_training does, but that would have the others in float32.
        student.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks by a name that transformers gives up
            return get_peft_model(student, adapters)
    except (TypeError, ValueError) as error:
        raise CachekdError("peft refuses these settings", where="setting 'lora'", found=str(error)) from None


def within(
    student: PreTrainedModel, settings: dict[str, Any], trainable: tuple[StudentPart, ...]
) -> dict[str, Any]:
    """Settings of LoRA that leave the frozen parts out, whatever `target_modules` says."""
    frozen = modules_outside(student, trainable)
    if not frozen:
        return settings
    theirs = settings.get("exclude_modules") or []
    if isinstance(theirs, str):  # a pattern, to peft
        return settings | {"exclude_modules": "|".join([f"(?:{theirs})", *map(re.escape, frozen)])}
    return settings | {"exclude_modules": [*theirs, *frozen]}
